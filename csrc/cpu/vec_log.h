// Logarithms on compiler vectors, accurate where they are nearly 0, with f - log(1 + f) >= 0 accurate there too:
// the terms that divergences between nearly equal distributions are made of.
#pragma once

#include "vec.h"

namespace r1k {
namespace R1K_ISA {

struct Log1p {
  VecF log;  // log(1 + f)
  VecF gap;  // f - log(1 + f), without cancellation
};

// `one_plus` is 1 + f rounded once, a positive normal number (or inf or NaN); `f` carries what that rounding lost.
// Within about two units in the last place of either result.
inline Log1p log1p_of(VecF f, VecF one_plus) {
  // one_plus = 2^e m with m in [sqrt(1/2), sqrt(2)).
  const VecI bits = bit_cast<VecI>(one_plus);
  const VecI exponent = (bits - 0x3f3504f3) >> 23;
  const VecF e = __builtin_convertvector(exponent, VecF);
  const VecI near_one = exponent == 0;
  const VecF m = bit_cast<VecF>(bits - (exponent << 23)) - 1.0f;
  const VecF x = near_one ? f : m;
  VecF p = broadcast(-0.06770003f);  // minimax of (x - log(1 + x)) / x^2 on that interval: 5e-9
  p = multiply_add(p, x, 0.11558942f);
  p = multiply_add(p, x, -0.11812596f);
  p = multiply_add(p, x, 0.12420613f);
  p = multiply_add(p, x, -0.14232242f);
  p = multiply_add(p, x, 0.16667543f);
  p = multiply_add(p, x, -0.2000145f);
  p = multiply_add(p, x, 0.25000012f);
  p = multiply_add(p, x, -0.33333322f);
  p = multiply_add(p, x, 0.5f);
  const VecF square = x * x * p;
  // log 2 in two floats: products of the first with an exponent are exact.
  VecF log = multiply_add(e, broadcast(0.693145752f), x - multiply_add(e, broadcast(-1.42860677e-6f), square));
  log = one_plus <= 3.40282347e38f ? log : one_plus;  // inf and NaN
  // f - log(1 + f) = square + what the change from f to x leaves, which is small beside it for the powers next to 1.
  VecF gap = f - log;
  gap = exponent == 1 ? square + multiply_add(one_plus, broadcast(0.5f), -0.693147181f) : gap;
  gap = exponent == -1 ? square + (-0.306852819f - f) : gap;
  return {log, near_one ? square : gap};
}

}  // namespace R1K_ISA
}  // namespace r1k
