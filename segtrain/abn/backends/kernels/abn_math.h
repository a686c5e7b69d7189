// Per-element maths of In-Place ABN, shared by NVRTC (CUDA), the emulator of the tests and the native CPU library.
// No CUDA, no standard library. S is the type of computation: float, or double on the CPU.
//
//   y = gamma * xhat + beta (+ shortcut),  z = act(y)
//
// A backward pass knows either the output z or an input of the affine map ("kept"), and recovers from it
//   t  : the value that is normalised by xhat = (t - center) * inverse
//   dy : the gradient at y
#ifndef SEGTRAIN_ABN_MATH_H
#define SEGTRAIN_ABN_MATH_H
#if defined(__CUDACC__)
#define ABN_FN __device__ __forceinline__
#else
#define ABN_FN inline
#endif
namespace abn {

enum { LEAKY_RELU = 0, ELU = 1, IDENTITY = 2 };

// param: negative slope of leaky ReLU, alpha of ELU. inverse = 1 / param. least: the lowest z / alpha of ELU that is
// inverted, eps(storage type) - 1: in half types 1 + z / alpha can round to 0 far below zero, whose logarithm is -inf.
template <typename S> struct Act { S param, inverse, least; };

ABN_FN float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
ABN_FN double multiply_add(double a, double b, double c) { return fma(a, b, c); }
ABN_FN float exp_minus_1(float v) { return expm1f(v); }
ABN_FN double exp_minus_1(double v) { return expm1(v); }
ABN_FN float log_1_plus(float v) { return log1pf(v); }
ABN_FN double log_1_plus(double v) { return log1p(v); }

template <int ACT, typename S> ABN_FN S activate(S y, Act<S> a) {
  if (ACT == LEAKY_RELU) return y > S(0) ? y : y * a.param;
  if (ACT == ELU) return y > S(0) ? y : a.param * exp_minus_1(y);
  return y;
}
// What is coded of y, and y from that: negative values have half the cells where their slope is half or less.
template <int ACT, typename S> ABN_FN bool squeezes(Act<S> a) {
  return ACT == LEAKY_RELU && a.param <= S(0.5) && a.param >= S(-0.5);
}
template <int ACT, typename S> ABN_FN S squeeze(S y, Act<S> a) { return squeezes<ACT>(a) && y < S(0) ? y * S(0.5) : y; }
template <int ACT, typename S> ABN_FN S unsqueeze(S w, Act<S> a) { return squeezes<ACT>(a) && w < S(0) ? w * S(2) : w; }
// What act(y) lies between where y is in a range of that many cells.
template <int ACT, typename S>
ABN_FN void bounds_of_range(S origin, S zero, S step, S cells, Act<S> a, S* low, S* high) {
  const S first = unsqueeze<ACT>(multiply_add(-zero, step, origin), a);
  const S last = unsqueeze<ACT>(multiply_add(cells - zero, step, origin), a);
  const S one = activate<ACT>(first, a), other = activate<ACT>(last, a);
  *low = one < other ? one : other;
  *high = one < other ? other : one;
  if (first < S(0) && last > S(0) && *low > S(0)) *low = S(0);  // a negative slope has its least value there
}
template <typename S>
ABN_FN void bounds_of_range(int act, S origin, S zero, S step, S cells, S param, S* low, S* high) {
  const Act<S> a{param, S(0), S(0)};
  if (act == LEAKY_RELU) bounds_of_range<LEAKY_RELU>(origin, zero, step, cells, a, low, high);
  else if (act == ELU) bounds_of_range<ELU>(origin, zero, step, cells, a, low, high);
  else bounds_of_range<IDENTITY>(origin, zero, step, cells, a, low, high);
}
// y from z = act(y)
template <int ACT, typename S> ABN_FN S invert(S z, Act<S> a) {
  if (ACT == LEAKY_RELU) return z > S(0) ? z : z * a.inverse;
  if (ACT == ELU) {
    const S ratio = z * a.inverse;
    return z > S(0) ? z : log_1_plus(ratio > a.least ? ratio : a.least);
  }
  return z;
}
// act'(y) from z = act(y)
template <int ACT, typename S> ABN_FN S derivative_at_output(S z, Act<S> a) {
  if (ACT == LEAKY_RELU) return z > S(0) ? S(1) : a.param;
  if (ACT == ELU) return z > S(0) ? S(1) : z + a.param;
  return S(1);
}
// act'(y) from y
template <int ACT, typename S> ABN_FN S derivative_at_input(S y, Act<S> a) {
  if (ACT == LEAKY_RELU) return y > S(0) ? S(1) : a.param;
  if (ACT == ELU) return y > S(0) ? S(1) : a.param * (exp_minus_1(y) + S(1));
  return S(1);
}

template <typename S> struct Recovered { S t, dy; };

// From the output and, if the layer added one, the shortcut (else 0).
template <int ACT, typename S> ABN_FN Recovered<S> from_output(S z, S dz, S shortcut, Act<S> a) {
  return Recovered<S>{invert<ACT>(z, a) - shortcut, dz * derivative_at_output<ACT>(z, a)};
}
// From the kept input t of y = t * scale + shift.
template <int ACT, typename S> ABN_FN Recovered<S> from_input(S t, S dz, S scale, S shift, Act<S> a) {
  return Recovered<S>{t, dz * derivative_at_input<ACT>(t * scale + shift, a)};
}

// Running moments of a stream of numbers, and the merge of two of them (Chan, Golub, LeVeque 1979).
template <typename S> struct Moments { S n, mean, m2; };

template <typename S> ABN_FN Moments<S> add(Moments<S> w, S v) {
  const S n = w.n + S(1);
  const S d = v - w.mean;
  const S mean = w.mean + d / n;
  return Moments<S>{n, mean, w.m2 + d * (v - mean)};
}
template <typename S> ABN_FN Moments<S> merge(Moments<S> a, Moments<S> b) {
  const S n = a.n + b.n;
  if (n == S(0)) return Moments<S>{S(0), S(0), S(0)};
  const S d = b.mean - a.mean, r = b.n / n;
  return Moments<S>{n, a.mean + d * r, a.m2 + b.m2 + d * d * a.n * r};
}

}  // namespace abn
#endif
