// CUDA kernels of In-Place ABN, compiled at run time: the Python side replaces the include of abn_math.h by its text
// and names the template instances that it needs. No standard library, static shared memory only.
//
// A dense tensor is (outer, channels, inner). LAST = false: inner is a plane of pixels (N, C, spatial), and a block
// works on one channel. LAST = true: inner is 1 (channels last, or (N, C)), and a thread works on VEC channels.
// Every kernel over tensors has the grid (channel groups, stripes): the elements of a channel are divided among
// gridDim.y stripes. A tensor is read and written once, with 128-bit accesses where VEC is not 1.
//
// Reductions take two launches, stripes and then a merge, so that no block waits for another and results do not depend
// on the order in which blocks run.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include "abn_math.h"

namespace abn {
typedef long long i64;

// Storage type T, and S: the type of computation and of per-channel vectors.
template <typename T> struct Stored;
template <> struct Stored<float> {
  typedef float S;
  static ABN_FN float up(float v) { return v; }
  static ABN_FN float down(float v) { return v; }
};
template <> struct Stored<double> {
  typedef double S;
  static ABN_FN double up(double v) { return v; }
  static ABN_FN double down(double v) { return v; }
};
template <> struct Stored<__half> {
  typedef float S;
  static ABN_FN float up(__half v) { return __half2float(v); }
  static ABN_FN __half down(float v) { return __float2half_rn(v); }
};
template <> struct Stored<__nv_bfloat16> {
  typedef float S;
  static ABN_FN float up(__nv_bfloat16 v) { return __bfloat162float(v); }
  static ABN_FN __nv_bfloat16 down(float v) { return __float2bfloat16_rn(v); }
};
template <typename T> using Wide = typename Stored<T>::S;

// Correctly rounded, unlike rsqrtf.
ABN_FN float reciprocal_root(float v) { return 1.0f / sqrtf(v); }
ABN_FN double reciprocal_root(double v) { return 1.0 / sqrt(v); }

// VEC elements moved by one memory instruction.
template <typename T, int VEC> struct alignas(sizeof(T) * VEC) Pack { T v[VEC]; };
template <typename T, int VEC> ABN_FN Pack<T, VEC> load(const T* p) {
  return *reinterpret_cast<const Pack<T, VEC>*>(p);
}
template <typename T, int VEC> ABN_FN void store(T* p, const Pack<T, VEC>& v) {
  *reinterpret_cast<Pack<T, VEC>*>(p) = v;
}

// Minimum number of blocks per multiprocessor, for __launch_bounds__. With 0 the compiler spills registers of these
// kernels to fit one more block; with 3 it does not.
template <typename T, int VEC, int ACT, bool LAST> constexpr int fewest_blocks() {
  return sizeof(T) == 8 || (ACT == ELU && LAST && VEC > 1) ? 3 : 0;
}

// N values of a per-channel vector: of the block's one channel, or of the thread's VEC channels.
template <typename S, int N> struct PerChannel {
  S v[N];
  ABN_FN S operator[](int k) const { return v[N == 1 ? 0 : k]; }
};
template <int N, typename S> ABN_FN PerChannel<S, N> per_channel(const S* p, i64 channel, S none) {
  PerChannel<S, N> out;
#pragma unroll
  for (int k = 0; k < N; ++k) out.v[k] = p ? p[channel + k] : none;
  return out;
}

// The packs of its channel(s) that one thread visits. It divides only before the first pack. group: of channels.
template <int VEC, bool LAST, int BLOCK> struct Walk;

template <int VEC, int BLOCK> struct Walk<VEC, false, BLOCK> {
  i64 channel, channels, outer, inner, plane, pack, packs, step_plane, step_pack;

  ABN_FN Walk(i64 outer, i64 channels, i64 inner, int, i64 group = blockIdx.x)
      : channels(channels), outer(outer), inner(inner) {
    const i64 first = (i64)blockIdx.y * BLOCK + threadIdx.x, step = (i64)gridDim.y * BLOCK;
    channel = group;
    packs = inner / VEC;
    plane = first / packs, pack = first - plane * packs;
    step_plane = step / packs, step_pack = step - step_plane * packs;
  }
  ABN_FN bool more() const { return plane < outer; }
  ABN_FN i64 at() const { return (plane * channels + channel) * inner + pack * VEC; }
  ABN_FN void next() {
    plane += step_plane, pack += step_pack;
    if (pack >= packs) pack -= packs, ++plane;
  }
};

// A block is 2^shift_x threads wide (channels) and BLOCK / 2^shift_x threads high (rows).
template <int VEC, int BLOCK> struct Walk<VEC, true, BLOCK> {
  i64 channel, channels, outer, row, step;

  ABN_FN Walk(i64 outer, i64 channels, i64, int shift_x, i64 group = blockIdx.x) : channels(channels), outer(outer) {
    channel = ((group << shift_x) + (threadIdx.x & ((1 << shift_x) - 1))) * VEC;
    row = (i64)blockIdx.y * (BLOCK >> shift_x) + (threadIdx.x >> shift_x);
    step = (i64)gridDim.y * (BLOCK >> shift_x);
  }
  ABN_FN bool more() const { return channel < channels && row < outer; }
  ABN_FN i64 at() const { return row * channels + channel; }
  ABN_FN void next() { row += step; }
};

// ------------------------------------------------------------------------------------------------ reductions

template <typename S> struct Pair { S a, b; };
template <typename S> ABN_FN Pair<S> merge(Pair<S> x, Pair<S> y) { return Pair<S>{x.a + y.a, x.b + y.b}; }

template <typename S> ABN_FN Moments<S> from_lane(Moments<S> w, int distance) {
  return Moments<S>{__shfl_xor_sync(0xffffffffu, w.n, distance), __shfl_xor_sync(0xffffffffu, w.mean, distance),
                    __shfl_xor_sync(0xffffffffu, w.m2, distance)};
}
template <typename S> ABN_FN Pair<S> from_lane(Pair<S> w, int distance) {
  return Pair<S>{__shfl_xor_sync(0xffffffffu, w.a, distance), __shfl_xor_sync(0xffffffffu, w.b, distance)};
}
template <typename W> ABN_FN W warp_merge(W w) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) w = merge(w, from_lane(w, distance));
  return w;
}

// Merge what the threads of a block hold, and write it to part, (channels, stripes).
template <int BLOCK, typename W>
ABN_FN void write_stripe(const W (&mine)[1], const Walk<1, false, BLOCK>*, W* part, i64 channel, i64, int) {
  const int WARPS = BLOCK / 32;
  __shared__ W shared[WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  W w = warp_merge(mine[0]);
  if (lane == 0) shared[warp] = w;
  __syncthreads();
  if (warp == 0) {
    w = W{};
    if (lane < WARPS) w = shared[lane];
    w = warp_merge(w);
    if (lane == 0) part[channel * gridDim.y + blockIdx.y] = w;
  }
}
// The thread's channels go through shared memory one by one, in two alternating buffers: the threads that merge one
// channel may lag behind those that write the next.
template <int BLOCK, typename W, int VEC>
ABN_FN void write_stripe(const W (&mine)[VEC], const Walk<1, true, BLOCK>*, W* part, i64 channel, i64 channels,
                         int shift_x) {
  __shared__ W shared[2][BLOCK];
  const int high = BLOCK >> shift_x, y = threadIdx.x >> shift_x, x = threadIdx.x - (y << shift_x);
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    shared[k & 1][threadIdx.x] = mine[k];
    __syncthreads();
    if (y == (k & (high - 1)) && channel + k < channels) {
      W w = W{};
      for (int other = 0; other < high; ++other) w = merge(w, shared[k & 1][(other << shift_x) + x]);
      part[(channel + k) * gridDim.y + blockIdx.y] = w;
    }
  }
}
// Merge the stripes of this warp's channel; every lane gets the result.
template <typename W> ABN_FN W merge_stripes(const W* part, i64 channel, int stripes) {
  W w = W{};
  for (int stripe = threadIdx.x & 31; stripe < stripes; stripe += 32) w = merge(w, part[channel * stripes + stripe]);
  return warp_merge(w);
}

// ------------------------------------------------------------------------------------------------ statistics

// Merge a pack of one channel into its moments. The pack's own moments take two passes over registers.
template <typename T, int VEC, typename S> ABN_FN void take(Moments<S> (&w)[1], const Pack<T, VEC>& p) {
  S sum = S(0), m2 = S(0);
#pragma unroll
  for (int k = 0; k < VEC; ++k) sum += Stored<T>::up(p.v[k]);
  const S mean = sum * (S(1) / VEC);
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    const S d = Stored<T>::up(p.v[k]) - mean;
    m2 += d * d;
  }
  w[0] = merge(w[0], Moments<S>{S(VEC), mean, m2});
}
// Add a pack of VEC channels to their moments, as `add` of abn_math.h does, with one division for all.
template <typename T, int VEC, typename S> ABN_FN void take_each(Moments<S> (&w)[VEC], const Pack<T, VEC>& p) {
  const S n = w[0].n + S(1), share = S(1) / n;
#pragma unroll
  for (int k = 0; k < VEC; ++k) {
    const S v = Stored<T>::up(p.v[k]), d = v - w[k].mean, mean = w[k].mean + d * share;
    w[k] = Moments<S>{n, mean, w[k].m2 + d * (v - mean)};
  }
}

template <typename T, int VEC, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_blocks<T, VEC, IDENTITY, LAST>())
statistics(const T* __restrict__ x, Moments<Wide<T>>* __restrict__ part, i64 outer, i64 channels, i64 inner, int shift_x) {
  typedef Moments<Wide<T>> W;
  const int N = LAST ? VEC : 1;  // channels a thread works on
  Walk<VEC, LAST, BLOCK> walk(outer, channels, inner, shift_x);
  W w[N];
#pragma unroll
  for (int k = 0; k < N; ++k) w[k] = W{};
  for (; walk.more(); walk.next()) {
    const Pack<T, VEC> p = load<T, VEC>(x + walk.at());
    if constexpr (LAST) take_each(w, p);
    else take(w, p);
  }
  write_stripe<BLOCK>(w, (const Walk<1, LAST, BLOCK>*)nullptr, part, walk.channel, channels, shift_x);
}

// How gamma is given: as it is, or as the layer's weight, of which it is |weight| + eps or the weight kept away from 0
// by eps. A null weight stands for 1.
enum { GAMMA = 0, MAGNITUDE = 1, SIGNED = 2 };
template <typename S> ABN_FN S scale_of(const S* gamma, i64 channel, S eps, int form) {
  if (form == GAMMA) return gamma[channel];
  if (!gamma) return S(1);
  const S w = gamma[channel];
  if (form == MAGNITUDE) return (w < S(0) ? -w : w) + eps;
  return w < S(0) ? (w > -eps ? -eps : w) : (w < eps ? eps : w);
}

// One warp per channel. count: values per channel. Writes the mean and the biased variance. Where var is null, it
// writes in place of the variance rstd, scale and inverse = 1 / gamma, the first and the last unless they are null, and
// updates the running statistics unless they are null. form: see scale_of.
template <typename S, int BLOCK>
__global__ void __launch_bounds__(BLOCK)
merge_statistics(const Moments<S>* __restrict__ part, i64 channels, int stripes, double count, S eps, S momentum,
                 const S* __restrict__ gamma, S* __restrict__ mean, S* __restrict__ var, S* __restrict__ rstd,
                 S* __restrict__ scale, S* __restrict__ running_mean, S* __restrict__ running_var, int form,
                 S* __restrict__ inverse) {
  const i64 channel = ((i64)blockIdx.x * BLOCK + threadIdx.x) >> 5;
  if (channel >= channels) return;  // whole warps leave together
  const Moments<S> w = merge_stripes(part, channel, stripes);
  if ((threadIdx.x & 31) != 0) return;
  const S biased = w.m2 / S(count);
  mean[channel] = w.mean;
  if (var) {
    var[channel] = biased;
    return;
  }
  const S own = scale_of(gamma, channel, eps, form), root = reciprocal_root(biased + eps);
  if (rstd) rstd[channel] = root;
  scale[channel] = own * root;
  if (inverse) inverse[channel] = S(1) / own;
  if (running_mean) running_mean[channel] += momentum * (w.mean - running_mean[channel]);
  if (running_var) running_var[channel] += momentum * (w.m2 / S(count - 1.0) - running_var[channel]);
}

// ------------------------------------------------------------------------------------------------ forward

// out = act((x - center) * scale + shift (+ shortcut)); out may be x. A null center or shortcut means 0.
template <typename T, int VEC, int ACT, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_blocks<T, VEC, ACT, LAST>())
normalise(const T* x, T* out, const T* __restrict__ shortcut, const Wide<T>* __restrict__ center,
          const Wide<T>* __restrict__ scale, const Wide<T>* __restrict__ shift, Wide<T> param, i64 outer,
          i64 channels, i64 inner, int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;  // channels a thread works on
  Walk<VEC, LAST, BLOCK> walk(outer, channels, inner, shift_x);
  if (!walk.more()) return;
  const Act<S> act{param, S(0), S(0)};
  const auto c = per_channel<N>(center, walk.channel, S(0));
  const auto a = per_channel<N>(scale, walk.channel, S(0));
  const auto b = per_channel<N>(shift, walk.channel, S(0));
  for (; walk.more(); walk.next()) {
    const i64 at = walk.at();
    Pack<T, VEC> p = load<T, VEC>(x + at), s;
    if (shortcut) s = load<T, VEC>(shortcut + at);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      S y = (Stored<T>::up(p.v[k]) - c[k]) * a[k] + b[k];
      if (shortcut) y += Stored<T>::up(s.v[k]);
      p.v[k] = Stored<T>::down(activate<ACT>(y, act));
    }
    store<T, VEC>(out + at, p);
  }
}

// ------------------------------------------------------------------------------------------------ backward

// (t, dy) of element k of a pack. INPUT: kept is t itself, else the output. added: the layer added the shortcut, which
// it never does where INPUT.
template <int ACT, bool INPUT, typename T, int VEC, int N, typename S>
ABN_FN Recovered<S> recover(const Pack<T, VEC>& kept, const Pack<T, VEC>& dz, const Pack<T, VEC>& shortcut, bool added,
                            const PerChannel<S, N>& scale, const PerChannel<S, N>& shift, Act<S> act, int k) {
  const S v = Stored<T>::up(kept.v[k]), g = Stored<T>::up(dz.v[k]);
  if constexpr (INPUT) return from_input<ACT>(v, g, scale[k], shift[k], act);
  else return from_output<ACT>(v, g, added ? Stored<T>::up(shortcut.v[k]) : S(0), act);
}

// The sums of dy and dy * xhat of every stripe: part, (channels, stripes, 2). least, inverse_param: see Act.
template <typename T, int VEC, int ACT, bool INPUT, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_blocks<T, VEC, ACT, LAST>())
sums(const T* __restrict__ kept, const T* __restrict__ dz, const T* __restrict__ shortcut,
     const Wide<T>* __restrict__ center, const Wide<T>* __restrict__ inverse, const Wide<T>* __restrict__ scale,
     const Wide<T>* __restrict__ shift, Wide<T> param, Wide<T> inverse_param, Wide<T> least,
     Pair<Wide<T>>* __restrict__ part, i64 outer, i64 channels, i64 inner, int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;
  Walk<VEC, LAST, BLOCK> walk(outer, channels, inner, shift_x);
  const Act<S> act{param, inverse_param, least};
  Pair<S> w[N];
#pragma unroll
  for (int k = 0; k < N; ++k) w[k] = Pair<S>{S(0), S(0)};
  if (walk.more()) {
    const auto c = per_channel<N>(center, walk.channel, S(0)),
               a = per_channel<N>(INPUT ? scale : nullptr, walk.channel, S(0)),
               b = per_channel<N>(INPUT ? shift : nullptr, walk.channel, S(0));
    for (; walk.more(); walk.next()) {
      const i64 at = walk.at();
      const Pack<T, VEC> p = load<T, VEC>(kept + at), g = load<T, VEC>(dz + at);
      Pack<T, VEC> s;
      if (!INPUT && shortcut) s = load<T, VEC>(shortcut + at);
      Pair<S> here{S(0), S(0)};
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        const Recovered<S> r = recover<ACT, INPUT>(p, g, s, shortcut != nullptr, a, b, act, k);
        const Pair<S> term{r.dy, r.dy * (r.t - c[k])};
        if (LAST) w[k % N] = merge(w[k % N], term);
        else here = merge(here, term);  // sum each pack by itself first: shorter chains of additions
      }
      if (!LAST) w[0] = merge(w[0], here);
    }
    const auto i = per_channel<N>(inverse, walk.channel, S(0));
#pragma unroll
    for (int k = 0; k < N; ++k) w[k].b *= i[k];  // the common factor of all xhat of the channel
  }
  write_stripe<BLOCK>(w, (const Walk<1, LAST, BLOCK>*)nullptr, part, walk.channel, channels, shift_x);
}

// One warp per channel. sums: (2, channels), or (channels,) where the second row has the memory dgamma. means, (2,
// channels), the sums divided by count, may be null. weight: null, or what gives the second sum its sign.
template <typename S, int BLOCK>
__global__ void __launch_bounds__(BLOCK)
merge_sums(const Pair<S>* __restrict__ part, i64 channels, int stripes, double count, S* __restrict__ sums,
           S* __restrict__ dgamma, S* __restrict__ means, const S* __restrict__ weight) {
  const i64 channel = ((i64)blockIdx.x * BLOCK + threadIdx.x) >> 5;
  if (channel >= channels) return;  // whole warps leave together
  const Pair<S> w = merge_stripes(part, channel, stripes);
  if ((threadIdx.x & 31) != 0) return;
  sums[channel] = w.a;
  (dgamma ? dgamma : sums + channels)[channel] = weight && weight[channel] < S(0) ? -w.b : w.b;
  if (means) {
    means[channel] = w.a / S(count);
    means[channels + channel] = w.b / S(count);
  }
}

// dx = factor * (dy - means[0] - xhat * means[1]); dy goes into dshortcut unless that is null. means: (2, channels).
template <typename T, int VEC, int ACT, bool INPUT, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_blocks<T, VEC, ACT, LAST>())
gradient(const T* __restrict__ kept, const T* __restrict__ dz, const T* __restrict__ shortcut,
         const Wide<T>* __restrict__ center, const Wide<T>* __restrict__ inverse, const Wide<T>* __restrict__ scale,
         const Wide<T>* __restrict__ shift, Wide<T> param, Wide<T> inverse_param, Wide<T> least,
         const Wide<T>* __restrict__ factor, const Wide<T>* __restrict__ means, T* __restrict__ dx,
         T* __restrict__ dshortcut, i64 outer, i64 channels, i64 inner, int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;  // channels a thread works on
  Walk<VEC, LAST, BLOCK> walk(outer, channels, inner, shift_x);
  if (!walk.more()) return;
  const Act<S> act{param, inverse_param, least};
  const auto c = per_channel<N>(center, walk.channel, S(0)),
             a = per_channel<N>(INPUT ? scale : nullptr, walk.channel, S(0)),
             b = per_channel<N>(INPUT ? shift : nullptr, walk.channel, S(0)),
             f = per_channel<N>(factor, walk.channel, S(0)), m = per_channel<N>(means, walk.channel, S(0));
  auto slope = per_channel<N>(inverse, walk.channel, S(0));  // of xhat * means[1] as a function of t
#pragma unroll
  for (int k = 0; k < N; ++k) slope.v[k] *= means[channels + walk.channel + k];
  for (; walk.more(); walk.next()) {
    const i64 at = walk.at();
    const Pack<T, VEC> p = load<T, VEC>(kept + at), g = load<T, VEC>(dz + at);
    Pack<T, VEC> s, out, through;
    if (!INPUT && shortcut) s = load<T, VEC>(shortcut + at);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      const Recovered<S> r = recover<ACT, INPUT>(p, g, s, shortcut != nullptr, a, b, act, k);
      out.v[k] = Stored<T>::down(f[k] * (r.dy - m[k] - (r.t - c[k]) * slope[k]));
      through.v[k] = Stored<T>::down(r.dy);
    }
    store<T, VEC>(dx + at, out);
    if (dshortcut) store<T, VEC>(dshortcut + at, through);
  }
}

}  // namespace abn
