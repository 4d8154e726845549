// Whether there are CUDA kernels in this build, and where they can run.  setup.py defines R1K_CUDA, or says in
// R1K_WITHOUT_CUDA why there are none.

#include "cuda_methods.h"

#include <sstream>
#include <string>

#ifdef R1K_CUDA
#include "cuda/stream.h"
#endif

namespace r1k {
namespace {

#ifdef R1K_CUDA
using gpu::architectures;
using gpu::missing;
#else
const char* architectures() { return ""; }
std::string missing(int) { return "built without CUDA: " R1K_WITHOUT_CUDA; }
#endif

}  // namespace

PyObject* cuda_architectures(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  std::istringstream names(architectures());
  for (std::string name; list != nullptr && names >> name;) {
    PyObject* text = PyUnicode_FromString(name.c_str());
    if (text == nullptr || PyList_Append(list, text) != 0) Py_CLEAR(list);
    Py_XDECREF(text);
  }
  return list;
}

PyObject* cuda_missing(PyObject*, PyObject* device_index) {
  const long device = PyLong_AsLong(device_index);
  if (device == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (device != static_cast<int>(device)) return PyErr_Format(PyExc_OverflowError, "device_index is %ld", device);
  std::string text;
  Py_BEGIN_ALLOW_THREADS  // the driver may have to be started
  text = missing(static_cast<int>(device));
  Py_END_ALLOW_THREADS
  return PyUnicode_FromString(text.c_str());
}

}  // namespace r1k
