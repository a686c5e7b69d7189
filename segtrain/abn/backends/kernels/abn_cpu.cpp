// The primitives of In-Place ABN on the CPU: a plain C library with the same per-element maths as the CUDA kernels.
// native.py compiles it at first use and calls it through ctypes; it needs no torch headers. aten.py describes the
// functions and their arguments. Tensors are (outer, channels, inner) in memory; inner = 1 is channels last.
//
// Full-size tensors are summed in float over a few hundred elements, then in double. Second moments are taken about
// the mean of the preceding elements, so that a large mean costs no digits; parts are merged by Chan's formula.
#include "abn_cpu.h"

namespace {

// Per-channel coefficients, each (C,) of S.
template <typename S> struct Recover { const S *center, *inverse, *scale, *shift; Act<S> act; };

// (t, dy) of one element.
template <int ACT, bool INPUT, typename S>
inline Recovered<S> recover(S kept, S dz, S shortcut, S scale, S shift, const Act<S>& a) {
  return INPUT ? from_input<ACT>(kept, dz, scale, shift, a) : from_output<ACT>(kept, dz, shortcut, a);
}

// ---------------------------------------------------------------------------------------------- one channel, NC...
template <typename T, typename S>
Moments<double> channel_moments(const T* x, long c, const Shape& d) {
  Moments<double> all{0, 0, 0};
  S pivot = S(x[c * d.inner]);
  for (long n = 0; n < d.outer; ++n) {
    const T* row = x + (n * d.channels + c) * d.inner;
    for (long from = 0; from < d.inner; from += CHUNK) {
      const long count = d.inner - from < CHUNK ? d.inner - from : CHUNK;
      const T* p = row + from;
      S s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
      for (long k = 0; k < count; ++k) {
        const S v = S(p[k]) - pivot;
        s += v;
        q += v * v;
      }
      const double mean = double(s) / count;
      all = merge(all, Moments<double>{double(count), double(pivot) + mean, double(q) - mean * s});
      pivot = S(all.mean);
    }
  }
  return all;
}

template <typename T, int ACT, bool SHORTCUT, typename S>
void normalise_run(const T* x, const T* shortcut, T* out, long count, S scale, S shift, const Act<S>& a) {
#pragma omp simd
  for (long k = 0; k < count; ++k) {
    S y = S(x[k]) * scale + shift;
    if (SHORTCUT) y += S(shortcut[k]);
    out[k] = Of<T>::down(activate<ACT>(y, a));
  }
}

template <typename T, int ACT, bool INPUT, bool SHORTCUT, typename S>
void channel_sums(const T* kept, const T* dz, const T* shortcut, long c, const Shape& d, const Recover<S>& r,
                  double* sum_dy, double* sum_dyx) {
  const S center = r.center[c], scale = INPUT ? r.scale[c] : S(0), shift = INPUT ? r.shift[c] : S(0);
  const Act<S> a = r.act;
  double all_a = 0, all_b = 0;
  for (long n = 0; n < d.outer; ++n) {
    const long row = (n * d.channels + c) * d.inner;
    for (long from = 0; from < d.inner; from += CHUNK) {
      const long count = d.inner - from < CHUNK ? d.inner - from : CHUNK, at = row + from;
      S s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
      for (long k = 0; k < count; ++k) {
        const Recovered<S> e = recover<ACT, INPUT>(S(kept[at + k]), S(dz[at + k]),
                                                   SHORTCUT ? S(shortcut[at + k]) : S(0), scale, shift, a);
        s += e.dy;
        q += e.dy * (e.t - center);
      }
      all_a += s;
      all_b += q;
    }
  }
  *sum_dy = all_a;
  *sum_dyx = all_b * double(r.inverse[c]);
}

template <typename T, int ACT, bool INPUT, bool SHORTCUT, typename S>
void gradient_run(const T* kept, const T* dz, const T* shortcut, T* dx, T* dshortcut, long count, S center, S inverse,
                  S scale, S shift, S factor, S mean_dy, S mean_dyx, const Act<S>& a) {
  if (dshortcut) {
#pragma omp simd
    for (long k = 0; k < count; ++k) {
      const Recovered<S> e =
          recover<ACT, INPUT>(S(kept[k]), S(dz[k]), SHORTCUT ? S(shortcut[k]) : S(0), scale, shift, a);
      dx[k] = Of<T>::down(factor * (e.dy - mean_dy - (e.t - center) * inverse * mean_dyx));
      dshortcut[k] = Of<T>::down(e.dy);
    }
    return;
  }
#pragma omp simd
  for (long k = 0; k < count; ++k) {
    const Recovered<S> e =
        recover<ACT, INPUT>(S(kept[k]), S(dz[k]), SHORTCUT ? S(shortcut[k]) : S(0), scale, shift, a);
    dx[k] = Of<T>::down(factor * (e.dy - mean_dy - (e.t - center) * inverse * mean_dyx));
  }
}

// -------------------------------------------------------------------------------------- some rows, channels last
// The first pass over a tensor goes from its end to its beginning, the second one from its beginning to its end. So
// each begins with what is still in the cache: what was written last, and what the first pass read last.

// Moments of rows first to last - 1 for each channel: mean and m2 are (channels,).
template <typename T, typename S>
void rows_moments(const T* x, long first, long last, long channels, double* mean, double* m2) {
  std::vector<S> memory(3 * channels);
  S *pivot = &memory[0], *s = pivot + channels, *q = s + channels;
  for (long c = 0; c < channels; ++c) {
    mean[c] = m2[c] = 0;
    if (first < last) pivot[c] = S(x[(last - 1) * channels + c]);
  }
  for (long to = last, from; to > first; to = from) {
    from = to - first < ROWS ? first : to - ROWS;
    for (long c = 0; c < channels; ++c) s[c] = q[c] = 0;
    long row = from;
    const long fours = channels * long(sizeof(T)) < PAGE ? from : to;
    for (; row + 4 <= fours; row += 4) {
      const T *p0 = x + row * channels, *p1 = p0 + channels, *p2 = p1 + channels, *p3 = p2 + channels;
#pragma omp simd
      for (long c = 0; c < channels; ++c) {
        const S v0 = S(p0[c]) - pivot[c], v1 = S(p1[c]) - pivot[c], v2 = S(p2[c]) - pivot[c], v3 = S(p3[c]) - pivot[c];
        s[c] += (v0 + v1) + (v2 + v3);
        q[c] += (v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3);
      }
    }
    for (; row < to; ++row) {
      const T* p = x + row * channels;
#pragma omp simd
      for (long c = 0; c < channels; ++c) {
        const S v = S(p[c]) - pivot[c];
        s[c] += v;
        q[c] += v * v;
      }
    }
    // As `merge` of abn_math.h, but what all channels share is computed before the loop.
    const double before = double(last - to), count = double(to - from), r = count / (before + count);
#pragma omp simd
    for (long c = 0; c < channels; ++c) {
      const double shift = double(s[c]) / count, d = double(pivot[c]) + shift - mean[c];
      mean[c] += d * r;
      m2[c] += double(q[c]) - shift * double(s[c]) + d * d * before * r;
      pivot[c] = S(mean[c]);
    }
  }
}

template <typename T, int ACT, bool SHORTCUT, typename S>
void normalise_rows(const T* x, const T* shortcut, T* out, long first, long last, long channels, const S* scale,
                    const S* shift, const Act<S>& a) {
  for (long row = first; row < last; ++row) {
    const long at = row * channels;
#pragma omp simd
    for (long c = 0; c < channels; ++c) {
      S y = S(x[at + c]) * scale[c] + shift[c];
      if (SHORTCUT) y += S(shortcut[at + c]);
      out[at + c] = Of<T>::down(activate<ACT>(y, a));
    }
  }
}

template <typename T, int ACT, bool INPUT, bool SHORTCUT, typename S>
void rows_sums(const T* kept, const T* dz, const T* shortcut, long first, long last, long channels,
               const Recover<S>& r, double* all) {
  std::vector<S> memory(2 * channels);
  S *s = &memory[0], *q = s + channels;
  const Act<S> a = r.act;
  const S *center = r.center, *scale = r.scale, *shift = r.shift;
  for (long c = 0; c < 2 * channels; ++c) all[c] = 0;
  for (long to = last, from; to > first; to = from) {
    from = to - first < ROWS ? first : to - ROWS;
    for (long c = 0; c < channels; ++c) s[c] = q[c] = 0;
    long row = from;
    const long fours = channels * long(sizeof(T)) < PAGE ? from : to;
    for (; row + 4 <= fours; row += 4) {
      const long at0 = row * channels, at1 = at0 + channels, at2 = at1 + channels, at3 = at2 + channels;
#pragma omp simd
      for (long c = 0; c < channels; ++c) {
        const S m = center[c];
#define ELEMENT(AT)                                                                                              \
  recover<ACT, INPUT>(S(kept[AT + c]), S(dz[AT + c]), SHORTCUT ? S(shortcut[AT + c]) : S(0), INPUT ? scale[c] : S(0), \
                      INPUT ? shift[c] : S(0), a)
        const Recovered<S> e0 = ELEMENT(at0), e1 = ELEMENT(at1), e2 = ELEMENT(at2), e3 = ELEMENT(at3);
        s[c] += (e0.dy + e1.dy) + (e2.dy + e3.dy);
        q[c] += (e0.dy * (e0.t - m) + e1.dy * (e1.t - m)) + (e2.dy * (e2.t - m) + e3.dy * (e3.t - m));
      }
    }
    for (; row < to; ++row) {
      const long at = row * channels;
#pragma omp simd
      for (long c = 0; c < channels; ++c) {
        const Recovered<S> e = ELEMENT(at);
        s[c] += e.dy;
        q[c] += e.dy * (e.t - center[c]);
      }
    }
#undef ELEMENT
    for (long c = 0; c < channels; ++c) {
      all[c] += s[c];
      all[channels + c] += double(q[c]) * double(r.inverse[c]);
    }
  }
}

template <typename T, int ACT, bool INPUT, bool SHORTCUT, typename S>
void gradient_rows(const T* kept, const T* dz, const T* shortcut, T* dx, T* dshortcut, long first, long last,
                   long channels, const Recover<S>& r, const S* factor, const S* mean_dy, const S* mean_dyx) {
  const Act<S> a = r.act;
  const S *center = r.center, *inverse = r.inverse, *scale = INPUT ? r.scale : r.center,
          *shift = INPUT ? r.shift : r.center;
  for (long row = first; row < last; ++row) {
    const long at = row * channels;
    if (dshortcut) {
#pragma omp simd
      for (long c = 0; c < channels; ++c) {
        const Recovered<S> e = recover<ACT, INPUT>(S(kept[at + c]), S(dz[at + c]),
                                                   SHORTCUT ? S(shortcut[at + c]) : S(0), scale[c], shift[c], a);
        dx[at + c] = Of<T>::down(factor[c] * (e.dy - mean_dy[c] - (e.t - center[c]) * inverse[c] * mean_dyx[c]));
        dshortcut[at + c] = Of<T>::down(e.dy);
      }
      continue;
    }
#pragma omp simd
    for (long c = 0; c < channels; ++c) {
      const Recovered<S> e = recover<ACT, INPUT>(S(kept[at + c]), S(dz[at + c]),
                                                 SHORTCUT ? S(shortcut[at + c]) : S(0), scale[c], shift[c], a);
      dx[at + c] = Of<T>::down(factor[c] * (e.dy - mean_dy[c] - (e.t - center[c]) * inverse[c] * mean_dyx[c]));
    }
  }
}

// ------------------------------------------------------------------------------------------------- whole tensors

// Moments of all channels of a channels-last tensor, merged over threads.
template <typename T, typename S>
void all_moments(const T* x, const Shape& d, int threads, Moments<double>* result) {
  const int n = team(d, threads);
  std::vector<double> parts(size_t(n) * 2 * d.channels);
#pragma omp parallel for num_threads(n) schedule(static, 1)
  for (int i = 0; i < n; ++i) {
    double* own = &parts[size_t(i) * 2 * d.channels];
    rows_moments<T, S>(x, part(d.outer, i, n), part(d.outer, i + 1, n), d.channels, own, own + d.channels);
  }
  for (long c = 0; c < d.channels; ++c) {
    result[c] = Moments<double>{0, 0, 0};
    for (int i = 0; i < n; ++i) {
      const double *own = &parts[size_t(i) * 2 * d.channels + c], count = double(part(d.outer, i + 1, n) - part(d.outer, i, n));
      result[c] = merge(result[c], Moments<double>{count, own[0], own[d.channels]});
    }
  }
}

template <typename T, typename S>
void statistics(const T* x, const Shape& d, S* mean, S* var, int threads) {
  if (d.inner == 1) {
    std::vector<Moments<double>> found(d.channels);
    all_moments<T, S>(x, d, threads, &found[0]);
    for (long c = 0; c < d.channels; ++c) { mean[c] = S(found[c].mean); var[c] = S(found[c].m2 / found[c].n); }
    return;
  }
#pragma omp parallel for num_threads(team(d, threads)) schedule(static)
  for (long c = 0; c < d.channels; ++c) {
    const Moments<double> w = channel_moments<T, S>(x, c, d);
    mean[c] = S(w.mean);
    var[c] = S(w.m2 / w.n);
  }
}

template <typename T, int ACT, bool SHORTCUT, typename S>
void normalise(const T* x, const T* shortcut, T* out, const Shape& d, const S* scale, const S* shift,
               const Act<S>& a, int threads) {
  const int n = team(d, threads);
  if (d.inner == 1) {
#pragma omp parallel for num_threads(n) schedule(static, 1)
    for (int i = 0; i < n; ++i)
      normalise_rows<T, ACT, SHORTCUT, S>(x, shortcut, out, part(d.outer, i, n), part(d.outer, i + 1, n), d.channels,
                                          scale, shift, a);
    return;
  }
#pragma omp parallel for num_threads(n) schedule(static)
  for (long i = 0; i < d.outer * d.channels; ++i)
    normalise_run<T, ACT, SHORTCUT, S>(x + i * d.inner, SHORTCUT ? shortcut + i * d.inner : nullptr, out + i * d.inner,
                                       d.inner, scale[i % d.channels], shift[i % d.channels], a);
}

// Compute mean, rstd, scale and shift of one channel from its moments, and update its running statistics.
template <typename S>
void finish(const Moments<double>& w, long c, const S* gamma, const S* beta, S* running_mean, S* running_var,
            double momentum, double eps, S* mean, S* rstd, S* scale, S* shift) {
  const double var = w.m2 / w.n;
  mean[c] = S(w.mean);
  rstd[c] = S(1 / sqrt(var + eps));
  scale[c] = gamma[c] * rstd[c];
  shift[c] = S(double(beta[c]) - w.mean * double(scale[c]));
  if (running_mean) {
    running_mean[c] = S((1 - momentum) * running_mean[c] + momentum * w.mean);
    running_var[c] = S((1 - momentum) * running_var[c] + momentum * w.m2 / (w.n - 1));
  }
}

template <typename T, int ACT, bool SHORTCUT, typename S>
void forward(const T* x, const T* shortcut, T* out, const Shape& d, const S* gamma, const S* beta, S* running_mean,
             S* running_var, double momentum, double eps, S* mean, S* rstd, const Act<S>& a, int threads) {
  std::vector<S> memory(2 * d.channels);
  S *scale = &memory[0], *shift = scale + d.channels;
  if (d.inner == 1) {
    std::vector<Moments<double>> found(d.channels);
    all_moments<T, S>(x, d, threads, &found[0]);
    for (long c = 0; c < d.channels; ++c)
      finish(found[c], c, gamma, beta, running_mean, running_var, momentum, eps, mean, rstd, scale, shift);
    normalise<T, ACT, SHORTCUT, S>(x, shortcut, out, d, scale, shift, a, threads);
    return;
  }
  // One channel at a time, so that the second pass finds it in the cache.
#pragma omp parallel for num_threads(team(d, threads)) schedule(static)
  for (long c = 0; c < d.channels; ++c) {
    finish(channel_moments<T, S>(x, c, d), c, gamma, beta, running_mean, running_var, momentum, eps, mean, rstd, scale,
           shift);
    for (long n = d.outer - 1; n >= 0; --n) {
      const long at = (n * d.channels + c) * d.inner;
      normalise_run<T, ACT, SHORTCUT, S>(x + at, SHORTCUT ? shortcut + at : nullptr, out + at, d.inner, scale[c],
                                         shift[c], a);
    }
  }
}

template <typename T, int ACT, bool INPUT, bool SHORTCUT, typename S>
void sums(const T* kept, const T* dz, const T* shortcut, const Shape& d, const Recover<S>& r, double* result,
          int threads) {
  const int n = team(d, threads);
  if (d.inner == 1) {
    std::vector<double> parts(size_t(n) * 2 * d.channels);
#pragma omp parallel for num_threads(n) schedule(static, 1)
    for (int i = 0; i < n; ++i)
      rows_sums<T, ACT, INPUT, SHORTCUT, S>(kept, dz, shortcut, part(d.outer, i, n), part(d.outer, i + 1, n),
                                            d.channels, r, &parts[size_t(i) * 2 * d.channels]);
    for (long k = 0; k < 2 * d.channels; ++k) {
      result[k] = 0;
      for (int i = 0; i < n; ++i) result[k] += parts[size_t(i) * 2 * d.channels + k];
    }
    return;
  }
#pragma omp parallel for num_threads(n) schedule(static)
  for (long c = 0; c < d.channels; ++c)
    channel_sums<T, ACT, INPUT, SHORTCUT, S>(kept, dz, shortcut, c, d, r, result + c, result + d.channels + c);
}

template <typename T, int ACT, bool INPUT, bool SHORTCUT, typename S>
void gradient(const T* kept, const T* dz, const T* shortcut, T* dx, T* dshortcut, const Shape& d, const Recover<S>& r,
              const S* factor, const S* means, int threads) {
  const int n = team(d, threads);
  if (d.inner == 1) {
#pragma omp parallel for num_threads(n) schedule(static, 1)
    for (int i = 0; i < n; ++i)
      gradient_rows<T, ACT, INPUT, SHORTCUT, S>(kept, dz, shortcut, dx, dshortcut, part(d.outer, i, n),
                                                part(d.outer, i + 1, n), d.channels, r, factor, means,
                                                means + d.channels);
    return;
  }
#pragma omp parallel for num_threads(n) schedule(static)
  for (long i = 0; i < d.outer * d.channels; ++i) {
    const long c = i % d.channels, at = i * d.inner;
    gradient_run<T, ACT, INPUT, SHORTCUT, S>(
        kept + at, dz + at, SHORTCUT ? shortcut + at : nullptr, dx + at, dshortcut ? dshortcut + at : nullptr, d.inner,
        r.center[c], r.inverse[c], INPUT ? r.scale[c] : S(0), INPUT ? r.shift[c] : S(0), factor[c], means[c],
        means[d.channels + c], r.act);
  }
}

template <typename T, int ACT, bool INPUT, bool SHORTCUT, typename S>
void backward(const T* kept, const T* dz, const T* shortcut, T* dx, T* dshortcut, const Shape& d, const Recover<S>& r,
              const S* factor, double* result, int threads) {
  const double count = double(d.outer) * d.inner;
  if (d.inner == 1) {
    sums<T, ACT, INPUT, SHORTCUT, S>(kept, dz, shortcut, d, r, result, threads);
    std::vector<S> means(2 * d.channels);
    for (long k = 0; k < 2 * d.channels; ++k) means[k] = S(result[k] / count);
    gradient<T, ACT, INPUT, SHORTCUT, S>(kept, dz, shortcut, dx, dshortcut, d, r, factor, &means[0], threads);
    return;
  }
#pragma omp parallel for num_threads(team(d, threads)) schedule(static)
  for (long c = 0; c < d.channels; ++c) {
    channel_sums<T, ACT, INPUT, SHORTCUT, S>(kept, dz, shortcut, c, d, r, result + c, result + d.channels + c);
    const S mean_dy = S(result[c] / count), mean_dyx = S(result[d.channels + c] / count);
    for (long n = d.outer - 1; n >= 0; --n) {
      const long at = (n * d.channels + c) * d.inner;
      gradient_run<T, ACT, INPUT, SHORTCUT, S>(
          kept + at, dz + at, SHORTCUT ? shortcut + at : nullptr, dx + at, dshortcut ? dshortcut + at : nullptr,
          d.inner, r.center[c], r.inverse[c], INPUT ? r.scale[c] : S(0), INPUT ? r.shift[c] : S(0), factor[c], mean_dy,
          mean_dyx, r.act);
    }
  }
}

}  // namespace

#define BY_SHORTCUT(NAME, ACT, ...)                        \
  if (shortcut) { NAME<T, ACT, true, S>(__VA_ARGS__); }    \
  else { NAME<T, ACT, false, S>(__VA_ARGS__); }
// A kept input never comes with a shortcut.
#define BY_FORM(NAME, ACT, ...)                                          \
  if (scale) { NAME<T, ACT, true, false, S>(__VA_ARGS__); }              \
  else if (shortcut) { NAME<T, ACT, false, true, S>(__VA_ARGS__); }      \
  else { NAME<T, ACT, false, false, S>(__VA_ARGS__); }

extern "C" {

void abn_statistics(const T* x, long outer, long channels, long inner, S* mean, S* var, int threads) {
  statistics<T, S>(x, Shape{outer, channels, inner}, mean, var, threads);
}

void abn_normalise(const T* x, const T* shortcut, T* out, long outer, long channels, long inner, const S* scale,
                   const S* shift, int act, double param, double least, int threads) {
  const Shape d{outer, channels, inner};
  const Act<S> a = act_of<S>(param, least);
#define CALL(ACT) BY_SHORTCUT(normalise, ACT, x, shortcut, out, d, scale, shift, a, threads)
  BY_ACT(CALL)
#undef CALL
}

void abn_forward(const T* x, const T* shortcut, T* out, long outer, long channels, long inner, const S* gamma,
                 const S* beta, S* running_mean, S* running_var, double momentum, double eps, S* mean, S* rstd,
                 int act, double param, double least, int threads) {
  const Shape d{outer, channels, inner};
  const Act<S> a = act_of<S>(param, least);
#define CALL(ACT)                                                                                                    \
  BY_SHORTCUT(forward, ACT, x, shortcut, out, d, gamma, beta, running_mean, running_var, momentum, eps, mean, rstd, \
              a, threads)
  BY_ACT(CALL)
#undef CALL
}

// result: (2, channels), the sums of dy and of dy * xhat.
void abn_sums(const T* kept, const T* dz, const T* shortcut, long outer, long channels, long inner, const S* center,
              const S* inverse, const S* scale, const S* shift, int act, double param, double least, S* result,
              int threads) {
  const Shape d{outer, channels, inner};
  const Recover<S> r{center, inverse, scale, shift, act_of<S>(param, least)};
  std::vector<double> found(2 * channels);
#define CALL(ACT) BY_FORM(sums, ACT, kept, dz, shortcut, d, r, &found[0], threads)
  BY_ACT(CALL)
  for (long k = 0; k < 2 * channels; ++k) result[k] = S(found[k]);
#undef CALL
}

void abn_gradient(const T* kept, const T* dz, const T* shortcut, T* dx, T* dshortcut, long outer, long channels,
                  long inner, const S* center, const S* inverse, const S* scale, const S* shift, const S* factor,
                  const S* means, int act, double param, double least, int threads) {
  const Shape d{outer, channels, inner};
  const Recover<S> r{center, inverse, scale, shift, act_of<S>(param, least)};
#define CALL(ACT) BY_FORM(gradient, ACT, kept, dz, shortcut, dx, dshortcut, d, r, factor, means, threads)
  BY_ACT(CALL)
#undef CALL
}

void abn_backward(const T* kept, const T* dz, const T* shortcut, T* dx, T* dshortcut, long outer, long channels,
                  long inner, const S* center, const S* inverse, const S* scale, const S* shift, const S* factor,
                  int act, double param, double least, S* result, int threads) {
  const Shape d{outer, channels, inner};
  const Recover<S> r{center, inverse, scale, shift, act_of<S>(param, least)};
  std::vector<double> found(2 * channels);
#define CALL(ACT) BY_FORM(backward, ACT, kept, dz, shortcut, dx, dshortcut, d, r, factor, &found[0], threads)
  BY_ACT(CALL)
  for (long k = 0; k < 2 * channels; ++k) result[k] = S(found[k]);
#undef CALL
}

// The layer in training over its own statistics: the above, and what the layer does with its vectors. A null weight
// stands for the scale 1, a null bias for 0. magnitude: whether gamma is |weight| + eps, else it is the weight kept away
// from 0 by eps. Writes inverse = 1 / gamma and factor = gamma * rstd, (channels,).
void abn_layer_forward(const T* x, const T* shortcut, T* out, long outer, long channels, long inner, const S* weight,
                       const S* bias, S* running_mean, S* running_var, double momentum, double eps, int magnitude,
                       S* inverse, S* factor, int act, double param, double least, int threads) {
  std::vector<S> memory((bias ? 3 : 4) * channels);
  S *gamma = &memory[0], *mean = gamma + channels, *rstd = mean + channels;
  const S least_gamma = S(eps);
  for (long c = 0; c < channels; ++c) {
    const S w = weight ? weight[c] : S(1);
    if (!weight) gamma[c] = w;
    else if (magnitude) gamma[c] = (w < 0 ? -w : w) + least_gamma;
    else gamma[c] = w < 0 ? (w > -least_gamma ? -least_gamma : w) : (w < least_gamma ? least_gamma : w);
  }
  abn_forward(x, shortcut, out, outer, channels, inner, gamma, bias ? bias : rstd + channels, running_mean, running_var,
              momentum, eps, mean, rstd, act, param, least, threads);
  for (long c = 0; c < channels; ++c) inverse[c] = S(1) / gamma[c], factor[c] = gamma[c] * rstd[c];
}

// dweight, dbias: (channels,). With magnitude, the gradient of |weight| has slope 1 at 0.
void abn_layer_backward(const T* kept, const T* dz, const T* shortcut, T* dx, T* dshortcut, long outer, long channels,
                        long inner, const S* weight, const S* bias, const S* inverse, const S* factor, int magnitude,
                        int act, double param, double least, S* dweight, S* dbias, int threads) {
  std::vector<S> memory((bias ? 2 : 3) * channels);
  S* result = &memory[0];
  abn_backward(kept, dz, shortcut, dx, dshortcut, outer, channels, inner, bias ? bias : result + 2 * channels, inverse,
               nullptr, nullptr, factor, act, param, least, result, threads);
  for (long c = 0; c < channels; ++c) {
    const S dgamma = result[channels + c];
    dbias[c] = result[c];
    dweight[c] = weight && magnitude && weight[c] < 0 ? -dgamma : dgamma;
  }
}

}  // extern "C"
