// Arguments of the divergence kernels on the CPU, on raw pointers.
#pragma once

#include "token_stats.h"

namespace r1k {

// The numbers are those r1kernels/ops/divergence.py passes.
enum class Divergence : int64_t { forward_kl = 0, reverse_kl = 1, jsd = 2 };

struct DivergenceForward {
  RowView student, teacher;
  const bool* mask;         // [N] or null; a false row is not read and gives zeros
  Divergence kind;
  double beta;
  double temperature;
  float* value;             // [N]
  double* lse_student;      // [N]
  double* lse_teacher;      // [N]
  double* inner;            // [N]: KL(p||m) for jsd, else the divergence
  double* student_entropy;  // [N]
  double* teacher_entropy;  // [N]
};

struct DivergenceBackward {
  RowView student, teacher;
  const double* lse_student;  // [N]
  const double* lse_teacher;  // [N]
  const double* inner;        // [N]
  const float* grad;          // [N]; rows where it is 0 are not read and give zeros
  Divergence kind;
  double beta;
  double temperature;
  double softcap;             // > 0: the student's logits are softcap * tanh(u / softcap), and the gradient is that of u
  RowView out;                // vocabulary stride 1; a row may start where the student's starts
  bool stream;                // write past the caches: out is larger than they are and apart from its inputs
};

}  // namespace r1k
