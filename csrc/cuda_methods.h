// What the module says of its CUDA kernels, those that it was built without included.
#pragma once

#include <Python.h>

namespace r1k {

PyObject* cuda_architectures(PyObject*, PyObject*);
PyObject* cuda_missing(PyObject*, PyObject* device_index);

}  // namespace r1k
