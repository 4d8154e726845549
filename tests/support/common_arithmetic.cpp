// csrc/common for numpy: the scalar functions over arrays, and the rows of logits as a kernel's threads sum them.
// Built by tests/host_module.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/arithmetic.h"
#include "common/objective.h"
#include "common/online_lse.h"
#include "common/row_view.h"
#include "common/vocabulary.h"

namespace py = pybind11;

namespace r1k {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// ---- rows of logits ----------------------------------------------------------------------------------------

// The entries first, first + stride, ... (groups of kCount) of a row, added up as one thread does.
template <bool kExact, int kCount>
RowSums thread_sums(const std::vector<float>& row, size_t first, size_t stride, Scale scale) {
  RowSums sums;
  for (size_t begin = first * kCount; begin < row.size(); begin += stride * kCount) {
    float x[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = row[begin + k];
    add_entries<kExact, kCount>(sums, x, scale);
  }
  return sums;
}

template <bool kExact>
RowSums thread_sums(int count, const std::vector<float>& row, size_t first, size_t stride, Scale scale) {
  switch (count) {
    case 1: return thread_sums<kExact, 1>(row, first, stride, scale);
    case 4: return thread_sums<kExact, 4>(row, first, stride, scale);
    case 8: return thread_sums<kExact, 8>(row, first, stride, scale);
  }
  throw std::invalid_argument("count is 1, 4 or 8");
}

// Padded to whole groups with -inf.
std::vector<float> row_of(const Array<float>& x, py::ssize_t r, int count) {
  std::vector<float> row(x.data(r, 0), x.data(r, 0) + x.shape(1));
  row.resize((row.size() + count - 1) / count * count, -INFINITY);
  return row;
}

template <bool kExact>
py::array_t<RowSums> add_all(const Array<float>& x, double temperature, int count) {
  py::array_t<RowSums> result(x.shape(0));
  for (py::ssize_t r = 0; r < x.shape(0); ++r) {
    result.mutable_at(r) = thread_sums<kExact>(count, row_of(x, r, count), 0, 1, scale_of(temperature));
  }
  return result;
}

// As a kernel: threads, warps of them in float32, the row in float64.
template <bool kExact>
py::array_t<RowStatistics> statistics(const Array<float>& x, const Array<int64_t>& ids, double temperature, int count,
                                      size_t threads) {
  constexpr size_t kWarp = 4;
  const Scale scale = scale_of(temperature);
  const double c = scale_of_sums<kExact>(temperature);
  py::array_t<RowStatistics> result(x.shape(0));
  for (py::ssize_t r = 0; r < x.shape(0); ++r) {
    std::vector<float> row = row_of(x, r, count);
    const float own = row[ids.at(r)];
    row[ids.at(r)] = -INFINITY;
    std::vector<RowSums> warps;
    for (size_t first = 0; first < threads; first += kWarp) {
      std::vector<RowSums> lanes;
      float top = kLowest;
      for (size_t t = first; t < first + kWarp; ++t) {
        lanes.push_back(thread_sums<kExact>(count, row, t, threads, scale));
        top = std::fmax(top, lanes.back().top);
      }
      RowSums warp{top, 0, 0, 0};
      for (const RowSums& lane : lanes) {
        const RowSums moved = relative_to<kExact>(lane, top, scale);
        warp.rest += moved.rest;
        warp.weighted += moved.weighted;
        warp.count += moved.count;
      }
      warps.push_back(warp);
    }
    float top = kLowest;
    for (const RowSums& warp : warps) top = std::fmax(top, warp.top);
    RowTotals totals = row_totals<kExact>(top, own, c);
    for (const RowSums& warp : warps) {
      add_part<kExact>(totals, warp.top, static_cast<double>(warp.rest) + warp.count, warp.weighted, c);
    }
    result.mutable_at(r) = row_statistics<kExact>(totals, own, temperature, c);
  }
  return result;
}

template <bool kExact>
float gradient_of(bool with_entropy, float x, double lse, double entropy, double temperature, double g, double eta) {
  const RowGradient row = row_gradient<kExact>(lse, entropy, temperature, g, eta);
  return with_entropy ? entry_gradient<kExact, true>(x, row) : entry_gradient<kExact, false>(x, row);
}

// ---- log-sum-exp of blocks ---------------------------------------------------------------------------------

struct LseAndEntropy {
  double lse, entropy;
};

// Blocks of `block` entries, whose sums are taken relative to the running maximum.
py::array_t<LseAndEntropy> online(const Array<double>& x, py::ssize_t block, double inv_temperature) {
  py::array_t<LseAndEntropy> result(x.shape(0));
  for (py::ssize_t r = 0; r < x.shape(0); ++r) {
    OnlineLse<double> state;
    for (py::ssize_t begin = 0; begin < x.shape(1); begin += block) {
      const py::ssize_t end = std::min(begin + block, x.shape(1));
      double top = state.max, sum = 0, weighted = 0;
      for (py::ssize_t j = begin; j < end; ++j) top = std::fmax(top, x.at(r, j));
      state.raise_max(top, inv_temperature);
      for (py::ssize_t j = begin; j < end; ++j) {
        if (x.at(r, j) == -INFINITY) continue;
        const double d = x.at(r, j) - state.max, e = std::exp(d * inv_temperature);
        sum += e;
        weighted += e == 0 ? 0 : e * d;
      }
      state.add(sum, weighted);
    }
    result.mutable_at(r) = {state.lse(inv_temperature), state.entropy(inv_temperature)};
  }
  return result;
}

py::array_t<int64_t> offsets(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                             const Array<int64_t>& rows) {
  RowView view{nullptr, DType::float32, 1, 1, static_cast<int>(sizes.size()), {}, {}};
  for (size_t k = 0; k < sizes.size(); ++k) {
    view.sizes[k] = sizes[k];
    view.strides[k] = strides[k];
  }
  py::array_t<int64_t> result(rows.size());
  for (py::ssize_t i = 0; i < rows.size(); ++i) result.mutable_at(i) = view.offset(rows.at(i));
  return result;
}

Objective objective_of(int surrogate, float clip_low, float clip_high, float ratio_cap, float tau_pos, float tau_neg) {
  return {static_cast<Surrogate>(surrogate), Ratio::token, 3, Aggregate::token_mean, clip_low, clip_high, ratio_cap,
          tau_pos, tau_neg, 0, 0, 0, false};
}

template <bool kExact>
void define(py::module_ m) {
  m.def("exp2_of_product", py::vectorize([](float d, float c, float c_rest, float lost) {
          return exp2_of_product<kExact>(d, Scale{c, c_rest}, lost);
        }));
  m.def("below", py::vectorize([](float x, float top, double temperature) {
          return kExact ? below(x, top, scale_of(temperature)) : moved(x, top, scale_of(temperature));
        }));
  m.def("relative_to", py::vectorize([](float old_top, float rest, float weighted, float count, float top,
                                        double temperature) {
          return relative_to<kExact>({old_top, rest, weighted, count}, top, scale_of(temperature));
        }));
  m.def("scale_of_sums", &scale_of_sums<kExact>);
  m.def("add_all", &add_all<kExact>);
  m.def("statistics", &statistics<kExact>);
  m.def("own_gradient", py::vectorize(&own_gradient<kExact>));
  m.def("entry_gradient", py::vectorize(&gradient_of<kExact>));
}

}  // namespace
}  // namespace r1k

PYBIND11_MODULE(R1K_MODULE, m) {
  using namespace r1k;
  PYBIND11_NUMPY_DTYPE(Power, d, e);
  PYBIND11_NUMPY_DTYPE(Scale, c, c_rest);
  PYBIND11_NUMPY_DTYPE(RowSums, top, rest, weighted, count);
  PYBIND11_NUMPY_DTYPE(RowStatistics, logprob, lse, entropy);
  PYBIND11_NUMPY_DTYPE(LseAndEntropy, lse, entropy);
  PYBIND11_NUMPY_DTYPE(Term, loss, slope);
  PYBIND11_NUMPY_DTYPE(SurrogateTerm, loss, slope, clipped_low, clipped_high, capped);

  m.def("exp2_fast", py::vectorize(&exp2_fast));
  m.def("product", py::vectorize(&product));
  m.def("sum", py::vectorize(&r1k::sum));
  m.def("difference", py::vectorize(&difference));
  m.def("product_error", py::vectorize(&product_error));
  m.def("difference_error", py::vectorize(&difference_error));
  m.def("scale_of", py::vectorize(&scale_of));
  define<true>(m.def_submodule("exact"));
  define<false>(m.def_submodule("rounded"));

  m.def("online", &online);
  m.def("offsets", &offsets);
  m.def("size_of", [](int dtype) { return size_of(static_cast<DType>(dtype)); });

  using Floats = py::array_t<float, py::array::forcecast>;
  py::class_<Objective>(m, "Objective")
      .def(py::init(&objective_of))
      .def("clip_term", [](const Objective& o, Floats ratio, Floats advantage) {
        return py::vectorize([&o](float r, float a) { return clip_term(o, r, a); })(ratio, advantage);
      })
      .def("cispo_term", [](const Objective& o, Floats ratio, Floats advantage, Floats logprob) {
        return py::vectorize([&o](float r, float a, float l) { return cispo_term(o, r, a, l); })(ratio, advantage,
                                                                                                 logprob);
      })
      .def("surrogate_term", [](const Objective& o, Floats log_ratio, Floats advantage, Floats logprob) {
        return py::vectorize([&o](float d, float a, float l) { return surrogate_term(o, d, a, l); })(
            log_ratio, advantage, logprob);
      });
  m.def("kl_term", py::vectorize(&kl_term));
}
