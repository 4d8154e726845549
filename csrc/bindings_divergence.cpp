// The divergence operators over PyTorch's stable ABI: check, allocate, launch, register.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/divergence.h"
#include "cpu/isa.h"

namespace {

using namespace r1k::bindings;

void check_divergence(const r1k::RowView& student, const r1k::RowView& teacher, int64_t kind, double beta) {
  bool same = student.leading == teacher.leading && student.vocab == teacher.vocab;
  for (int k = 0; same && k < student.leading; ++k) same = student.sizes[k] == teacher.sizes[k];
  R1K_CHECK(same, "student and teacher must have the same shape");
  R1K_CHECK(kind >= 0 && kind <= 2, "kind is ", kind, ", expected 0, 1 or 2");
  const bool is_jsd = static_cast<r1k::Divergence>(kind) == r1k::Divergence::jsd;
  R1K_CHECK(!is_jsd || (beta > 0 && beta < 1), "beta is ", beta, ", expected a number between 0 and 1");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> divergence(Tensor student, Tensor teacher, MaybeTensor mask,
                                                                      int64_t kind, double beta, double temperature) {
  const std::vector<int64_t> sizes = leading_sizes(student);
  Tensor value = empty(student, sizes, ScalarType::Float);
  Tensor lse_student = empty(student, sizes, ScalarType::Double), lse_teacher = empty(student, sizes, ScalarType::Double);
  Tensor inner = empty(student, sizes, ScalarType::Double);
  Tensor student_entropy = empty(student, sizes, ScalarType::Double);
  Tensor teacher_entropy = empty(student, sizes, ScalarType::Double);
  const auto result = std::make_tuple(value, lse_student, lse_teacher, inner, student_entropy, teacher_entropy);

  r1k::DivergenceForward args;
  args.student = row_view(student);
  args.teacher = row_view(teacher);
  check_divergence(args.student, args.teacher, kind, beta);
  const int64_t count = value.numel();
  if (count == 0) return result;
  args.mask = bools(mask, "mask", count);
  args.kind = static_cast<r1k::Divergence>(kind);
  args.beta = beta;
  args.temperature = temperature;
  args.value = static_cast<float*>(value.data_ptr());
  args.lse_student = static_cast<double*>(lse_student.data_ptr());
  args.lse_teacher = static_cast<double*>(lse_teacher.data_ptr());
  args.inner = static_cast<double*>(inner.data_ptr());
  args.student_entropy = static_cast<double*>(student_entropy.data_ptr());
  args.teacher_entropy = static_cast<double*>(teacher_entropy.data_ptr());
  const auto forward = r1k::active_kernels()->divergence->forward;
  parallel_ranges(count, row_grain(args.student.vocab), [&](int64_t begin, int64_t end) { forward(args, begin, end); });
  return result;
}

// First and last byte of all rows.
struct Extent {
  explicit Extent(const r1k::RowView& view) {
    int64_t last = (view.vocab - 1) * view.vocab_stride;
    for (int k = 0; k < view.leading; ++k) last += (view.sizes[k] - 1) * view.strides[k];
    begin = static_cast<const char*>(view.data);
    end = begin + (last + 1) * r1k::size_of(view.dtype);
  }
  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
  const char *begin, *end;
};

// Whether row r of `out` starts where row r of `in` starts and is no longer.
bool in_place(const r1k::RowView& out, const r1k::RowView& in) {
  const int64_t out_size = r1k::size_of(out.dtype), in_size = r1k::size_of(in.dtype);
  bool same = out.data == in.data && in.vocab_stride == 1 && out_size <= in_size;
  for (int k = 0; k < out.leading; ++k) {
    same = same && (out.sizes[k] == 1 || out.strides[k] * out_size == in.strides[k] * in_size);
  }
  return same;
}

void divergence_backward(Tensor student, Tensor teacher, Tensor lse_student, Tensor lse_teacher, Tensor inner,
                         Tensor grad, int64_t kind, double beta, double temperature, Tensor out, double softcap) {
  r1k::DivergenceBackward args;
  args.student = row_view(student);
  args.teacher = row_view(teacher);
  args.out = row_view(out);
  check_divergence(args.student, args.teacher, kind, beta);
  check_divergence(args.student, args.out, kind, beta);
  R1K_CHECK(args.out.vocab_stride == 1 || args.out.vocab == 1, "out must have unit stride over the vocabulary, got ",
            args.out.vocab_stride);
  args.out.vocab_stride = 1;
  int64_t count = 1;
  for (int k = 0; k < args.student.leading; ++k) count *= args.student.sizes[k];
  args.lse_student = data<double>(lse_student, "lse_student", ScalarType::Double, count);
  args.lse_teacher = data<double>(lse_teacher, "lse_teacher", ScalarType::Double, count);
  args.inner = data<double>(inner, "inner", ScalarType::Double, count);
  args.grad = floats(grad, "grad", count);
  if (count == 0 || args.student.vocab == 0) return;
  const Extent written(args.out);
  const bool shared = written.overlaps(Extent(args.student));
  R1K_CHECK(!shared || in_place(args.out, args.student),
            "out overlaps student, expected rows that start together and elements of out that are no wider");
  R1K_CHECK(!written.overlaps(Extent(args.teacher)), "out overlaps teacher, expected memory of its own");
  args.kind = static_cast<r1k::Divergence>(kind);
  args.beta = beta;
  args.temperature = temperature;
  R1K_CHECK(softcap >= 0, "softcap is ", softcap, ", expected a number >= 0");
  args.softcap = softcap;
  const int64_t bytes = count * args.out.vocab * r1k::size_of(args.out.dtype);
  constexpr int64_t kBeyondCaches = 32 << 20;
  args.stream = !shared && bytes >= kBeyondCaches;
  const auto backward = r1k::active_kernels()->divergence->backward;
  parallel_ranges(count, row_grain(args.student.vocab), [&](int64_t begin, int64_t end) { backward(args, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, m) {
  m.impl("divergence", TORCH_BOX(&divergence));
  m.impl("divergence_backward", TORCH_BOX(&divergence_backward));
}
