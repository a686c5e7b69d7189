// CUDA kernels of maps kept in 8 or 4 bits. The text follows that of abn.cu, and has its grids. The format, and what
// every function means: codes.py.
//
// A thread moves units of VEC values of a row and their codes. WIDE: with one access each. Else VEC is 2, because two
// values share a byte of 4-bit codes, and the last unit of a row may have one value only.
//
// All that decides about codes is computed by explicit fused operations and by comparisons, so that neither the grid
// nor the compiler's contraction changes a bit of them.
namespace abn {
typedef unsigned char u8;

ABN_FN float round_down(float v) { return floorf(v); }
ABN_FN double round_down(double v) { return floor(v); }
ABN_FN float round_up(float v) { return ceilf(v); }
ABN_FN double round_up(double v) { return ceil(v); }

template <> struct Stored<u8> {
  typedef int S;
  static ABN_FN u8 down(int v) { return u8(v); }
};

// As fewest_blocks of abn.cu.
template <typename T, int VEC, bool LAST> constexpr int fewest_coded_blocks() {
  return VEC == 1 ? 0 : LAST && (VEC > 4 || sizeof(T) == 8) ? 2 : 3;
}

// ------------------------------------------------------------------------------------------------ smallest and largest

// Numbers as unsigned integers of the same order. Every nan lies beyond the infinity of its sign.
ABN_FN unsigned key_of(float v) {
  const unsigned b = (unsigned)__float_as_int(v);
  return b >> 31 ? ~b : b | 0x80000000u;
}
ABN_FN float from_key(unsigned key) { return __int_as_float((int)(key >> 31 ? key ^ 0x80000000u : ~key)); }
ABN_FN unsigned long long key_of(double v) {
  const unsigned long long b = (unsigned long long)__double_as_longlong(v);
  return b >> 63 ? ~b : b | 0x8000000000000000ull;
}
ABN_FN double from_key(unsigned long long key) {
  return __longlong_as_double((i64)(key >> 63 ? key ^ 0x8000000000000000ull : ~key));
}
template <typename S> struct Key { typedef unsigned type; };
template <> struct Key<double> { typedef unsigned long long type; };

// The key of the largest value, and the complement of the key of the smallest: both grow, and 0 stands for no value.
template <typename S> struct Ends {
  typename Key<S>::type high, low;
  ABN_FN S largest() const { return from_key(high); }
  ABN_FN S smallest() const { return from_key((typename Key<S>::type)~low); }
};
template <typename S> ABN_FN Ends<S> merge(Ends<S> a, Ends<S> b) {
  return Ends<S>{a.high > b.high ? a.high : b.high, a.low > b.low ? a.low : b.low};
}
template <typename S> ABN_FN Ends<S> from_lane(Ends<S> w, int distance) {
  return Ends<S>{__shfl_xor_sync(0xffffffffu, w.high, distance), __shfl_xor_sync(0xffffffffu, w.low, distance)};
}
template <typename S> ABN_FN void take(Ends<S>& w, S v) {
  const auto key = key_of(v);
  w = merge(w, Ends<S>{key, ~key});
}

template <typename S> struct Summary {
  Moments<S> moments;
  Ends<S> ends;
};
template <typename S> ABN_FN Summary<S> merge(Summary<S> a, Summary<S> b) {
  return Summary<S>{merge(a.moments, b.moments), merge(a.ends, b.ends)};
}
template <typename S> ABN_FN Summary<S> from_lane(Summary<S> w, int distance) {
  return Summary<S>{from_lane(w.moments, distance), from_lane(w.ends, distance)};
}

// What a block of these kernels works on: the samples with ranges of their own have gridDim.x / samples blocks each.
struct Share {
  i64 sample, group;
  ABN_FN Share(i64 samples) {
    const unsigned groups = gridDim.x / (unsigned)samples;
    sample = blockIdx.x / groups, group = blockIdx.x - sample * groups;
  }
};

// Moments and ends of every stripe of x: part, (samples, channels, stripes). outer: of one of the `samples`. With
// samples = 1 the moments are those of `statistics`, bit for bit.
template <typename T, int VEC, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_coded_blocks<T, VEC, LAST>())
summarise(const T* __restrict__ x, Summary<Wide<T>>* __restrict__ part, i64 samples, i64 outer, i64 channels, i64 inner,
          int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;  // channels a thread works on
  const Share share(samples);
  Walk<VEC, LAST, BLOCK> walk(outer, channels, inner, shift_x, share.group);
  x += share.sample * outer * channels * inner;
  Moments<S> moments[N];
  Summary<S> w[N];
#pragma unroll
  for (int k = 0; k < N; ++k) moments[k] = Moments<S>{}, w[k] = Summary<S>{};
  for (; walk.more(); walk.next()) {
    const Pack<T, VEC> p = load<T, VEC>(x + walk.at());
    if constexpr (LAST) take_each(moments, p);
    else take(moments, p);
#pragma unroll
    for (int k = 0; k < VEC; ++k) take(w[LAST ? k : 0].ends, Stored<T>::up(p.v[k]));
  }
#pragma unroll
  for (int k = 0; k < N; ++k) w[k].moments = moments[k];
  write_stripe<BLOCK>(w, (const Walk<1, LAST, BLOCK>*)nullptr, part + share.sample * channels * gridDim.y,
                      walk.channel, channels, shift_x);
}

// One warp per channel. count: values per channel. Writes mean, biased variance, and extremes, (2, samples, channels).
template <typename S, int BLOCK>
__global__ void __launch_bounds__(BLOCK, 1)
merge_summaries(const Summary<S>* __restrict__ part, i64 samples, i64 channels, int stripes, double count,
                S* __restrict__ mean, S* __restrict__ var, S* __restrict__ extremes) {
  const i64 channel = ((i64)blockIdx.x * BLOCK + threadIdx.x) >> 5;
  if (channel >= channels) return;  // whole warps leave together
  Moments<S> all = Moments<S>{};
  for (i64 range = channel; range < samples * channels; range += channels) {
    Ends<S> ends = Ends<S>{};
    for (int stripe = threadIdx.x & 31; stripe < stripes; stripe += 32) {
      const Summary<S> w = part[range * stripes + stripe];
      all = merge(all, w.moments), ends = merge(ends, w.ends);
    }
    ends = warp_merge(ends);
    if ((threadIdx.x & 31) != 0) continue;
    extremes[range] = ends.smallest();
    extremes[samples * channels + range] = ends.largest();
  }
  all = warp_merge(all);
  if ((threadIdx.x & 31) != 0) return;
  mean[channel] = all.mean;
  var[channel] = all.m2 / S(count);
}

// ------------------------------------------------------------------------------------------------ ranges

// y as `encode` computes it, before the shortcut.
template <typename S> ABN_FN S affine(S x, S scale, S shift) { return multiply_add(x, scale, shift); }

// Ends of y of every stripe: part, (samples, channels, stripes). outer: of one of the `samples`.
template <typename T, int VEC, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_coded_blocks<T, VEC, LAST>())
search(const T* __restrict__ x, const T* __restrict__ shortcut, const Wide<T>* __restrict__ scale,
       const Wide<T>* __restrict__ shift, Ends<Wide<T>>* __restrict__ part, i64 samples, i64 outer, i64 channels,
       i64 inner, int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;
  const Share share(samples);
  Walk<VEC, LAST, BLOCK> walk(outer, channels, inner, shift_x, share.group);
  const i64 start = share.sample * outer * channels * inner;
  Ends<S> w[N];
#pragma unroll
  for (int k = 0; k < N; ++k) w[k] = Ends<S>{};
  if (walk.more()) {
    const auto a = per_channel<N>(scale, walk.channel, S(0)), b = per_channel<N>(shift, walk.channel, S(0));
    for (; walk.more(); walk.next()) {
      const i64 at = start + walk.at();
      const Pack<T, VEC> p = load<T, VEC>(x + at);
      Pack<T, VEC> s;
      if (shortcut) s = load<T, VEC>(shortcut + at);
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        S y = affine(Stored<T>::up(p.v[k]), a[k], b[k]);
        if (shortcut) y += Stored<T>::up(s.v[k]);
        take(w[LAST ? k : 0], y);
      }
    }
  }
  write_stripe<BLOCK>(w, (const Walk<1, LAST, BLOCK>*)nullptr, part + share.sample * channels * gridDim.y,
                      walk.channel, channels, shift_x);
}

// The ranges of a shortcut in its own layer's codes, which the activation `number` made of them; or null.
template <typename S> struct Known {
  const S* ranges;
  int number;
  S param;
};

// ranges, (3, count): origin, zero and step of range i, between the ends or, with a known shortcut, between their sums
// with the bounds of that. below: the factor of negative values, see squeeze of abn_math.h. top: the last cell. tiny: the
// least step.
template <typename S>
ABN_FN void write_range(const Ends<S>& w, const Known<S>& known, S below, S top, S tiny, S* ranges, i64 count, i64 i) {
  S low = w.smallest(), high = w.largest();
  if (known.ranges) {
    S least, most;
    bounds_of_range(known.number, known.ranges[i], known.ranges[count + i], known.ranges[2 * count + i], top + S(1),
                    known.param, &least, &most);
    low += least, high += most;
  }
  low *= low < S(0) ? below : S(1);
  high *= high < S(0) ? below : S(1);
  const S wide = high - low;
  S step = wide / top;
  if (!(step >= tiny)) step = S(0);  // a constant: one cell
  const bool both = low < S(0) && high > S(0) && step > S(0), finite = wide - wide == S(0);
  ranges[i] = finite ? (both ? S(0) : low) : wide - wide;
  ranges[count + i] = finite ? (both ? round_up(-low / step) : S(0)) : wide - wide;
  ranges[2 * count + i] = finite ? step : wide - wide;
}

// One warp per range. part: (count, stripes).
template <typename S, int BLOCK>
__global__ void __launch_bounds__(BLOCK)
merge_ranges(const Ends<S>* __restrict__ part, i64 count, int stripes, const S* __restrict__ shortcut_ranges,
             int shortcut_act, S shortcut_param, S below, S top, S tiny, S* __restrict__ ranges) {
  const i64 range = ((i64)blockIdx.x * BLOCK + threadIdx.x) >> 5;
  if (range >= count) return;  // whole warps leave together
  const Ends<S> w = merge_stripes(part, range, stripes);
  const Known<S> known{shortcut_ranges, shortcut_act, shortcut_param};
  if ((threadIdx.x & 31) == 0) write_range(w, known, below, top, tiny, ranges, count, range);
}

// One thread per range. extremes: (2, count), of x; y is a monotonous function of x in every rounded operation too, so
// that these are the ranges that a search finds.
template <typename S, int BLOCK>
__global__ void __launch_bounds__(BLOCK)
map_ranges(const S* __restrict__ extremes, const S* __restrict__ scale, const S* __restrict__ shift, i64 channels,
           i64 count, const S* __restrict__ shortcut_ranges, int shortcut_act, S shortcut_param, S below, S top, S tiny,
           S* __restrict__ ranges) {
  const i64 range = (i64)blockIdx.x * BLOCK + threadIdx.x;
  if (range >= count) return;
  const i64 channel = range % channels;
  Ends<S> w = Ends<S>{};
  take(w, affine(extremes[range], scale[channel], shift[channel]));
  take(w, affine(extremes[count + range], scale[channel], shift[channel]));
  const Known<S> known{shortcut_ranges, shortcut_act, shortcut_param};
  write_range(w, known, below, top, tiny, ranges, count, range);
}

// ------------------------------------------------------------------------------------------------ units

// The units that one thread visits. `samples` have ranges of their own, or it is 1.
template <int VEC, bool LAST, int BLOCK> struct Units;

template <int VEC, int BLOCK> struct Units<VEC, false, BLOCK> : Walk<VEC, false, BLOCK> {
  typedef Walk<VEC, false, BLOCK> Base;
  i64 length;
  bool apart;
  ABN_FN Units(i64 samples, i64 outer, i64 channels, i64 inner, int shift_x)
      : Base(outer, channels, (inner + VEC - 1) / VEC * VEC, shift_x), length(inner), apart(samples > 1) {}
  ABN_FN i64 sample() const { return apart ? Base::plane : 0; }
  ABN_FN i64 row() const { return Base::plane * Base::channels + Base::channel; }
  ABN_FN i64 first() const { return Base::pack * VEC; }  // place in the row
};

template <int VEC, int BLOCK> struct Units<VEC, true, BLOCK> : Walk<VEC, true, BLOCK> {
  typedef Walk<VEC, true, BLOCK> Base;
  i64 length, rows, image, rest, step_image, step_rest;
  ABN_FN Units(i64 samples, i64 outer, i64 channels, i64 inner, int shift_x)
      : Base(outer, channels, inner, shift_x), length(channels), rows(outer / samples) {
    image = Base::row / rows, rest = Base::row - image * rows;
    step_image = Base::step / rows, step_rest = Base::step - step_image * rows;
  }
  ABN_FN i64 sample() const { return image; }
  ABN_FN i64 row() const { return Base::row; }
  ABN_FN i64 first() const { return Base::channel; }
  ABN_FN void next() {
    Base::next();
    image += step_image, rest += step_rest;
    if (rest >= rows) rest -= rows, ++image;
  }
};

// Where a unit's values and its codes are, and how many values it has.
template <int VEC, bool WIDE, int BITS> struct Place {
  i64 at, code;
  int count;
  template <typename U> ABN_FN explicit Place(const U& u) {
    const i64 first = u.first(), left = u.length - first;
    at = u.row() * u.length + first;
    code = u.row() * ((u.length + 1) / 2) + first / 2;  // of 4-bit codes; 8-bit ones lie as their values do
    count = WIDE || left >= VEC ? VEC : (int)left;
  }
  ABN_FN bool has(int k) const { return WIDE || k < count; }

  template <typename T> ABN_FN Pack<T, VEC> values(const T* p) const {
    if constexpr (WIDE) {
      return load<T, VEC>(p + at);
    } else {
      Pack<T, VEC> out;
#pragma unroll
      for (int k = 0; k < VEC; ++k) out.v[k] = has(k) ? p[at + k] : Stored<T>::down(Wide<T>(0));
      return out;
    }
  }
  template <typename T> ABN_FN void put(T* p, const Pack<T, VEC>& v) const {
    if constexpr (WIDE) {
      store<T, VEC>(p + at, v);
    } else {
#pragma unroll
      for (int k = 0; k < VEC; ++k)
        if (has(k)) p[at + k] = v.v[k];
    }
  }
  ABN_FN Pack<u8, VEC> cells(const u8* codes) const {
    if constexpr (BITS == 8) {
      return values(codes);
    } else {
      const Pack<u8, VEC / 2> b = load<u8, VEC / 2>(codes + code);
      Pack<u8, VEC> out;
#pragma unroll
      for (int k = 0; k < VEC; ++k) out.v[k] = k % 2 ? b.v[k / 2] >> 4 : b.v[k / 2] & 15;
      return out;
    }
  }
  ABN_FN void put_cells(u8* codes, const Pack<u8, VEC>& cells) const {
    if constexpr (BITS == 8) {
      put(codes, cells);
    } else {
      Pack<u8, VEC / 2> b;
#pragma unroll
      for (int k = 0; k < VEC; k += 2) b.v[k / 2] = u8(cells.v[k] | (has(k + 1) ? cells.v[k + 1] << 4 : 0));
      store<u8, VEC / 2>(codes + code, b);
    }
  }
};

// As per_channel, for `count` channels of which the last may be missing: its value is then another's.
template <int N, typename S> ABN_FN PerChannel<S, N> per_value(const S* p, i64 channel, int count) {
  PerChannel<S, N> out;
#pragma unroll
  for (int k = 0; k < N; ++k) out.v[k] = p[channel + (k < count ? k : 0)];
  return out;
}

// y = unsqueeze(step * cell + offset), in the ranges of the sample that the thread is in.
template <typename S, int N> struct Rebuild {
  PerChannel<S, N> step, offset;
  i64 sample = -1;
  ABN_FN void enter(i64 next, const S* ranges, i64 samples, i64 channels, i64 channel, int count) {
    if (next == sample) return;
    sample = next;
    const i64 all = samples * channels, at = sample * channels + channel;
    const auto origin = per_value<N>(ranges, at, count), zero = per_value<N>(ranges + all, at, count);
    step = per_value<N>(ranges + 2 * all, at, count);
#pragma unroll
    for (int k = 0; k < N; ++k) offset.v[k] = multiply_add(S(0.5) - zero.v[k], step.v[k], origin.v[k]);
  }
  template <int ACT> ABN_FN S value(u8 cell, int k, Act<S> act) const {
    return unsqueeze<ACT>(multiply_add(S(cell), step[k], offset[k]), act);
  }
};

// ------------------------------------------------------------------------------------------------ forward

// The codes of y = scale * x + shift (+ shortcut), and out = act(y); out may be x. A null shortcut means 0.
template <typename T, int VEC, bool WIDE, int ACT, int BITS, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_coded_blocks<T, VEC, LAST>())
encode(const T* x, T* out, const T* __restrict__ shortcut, const Wide<T>* __restrict__ scale,
       const Wide<T>* __restrict__ shift, const Wide<T>* __restrict__ ranges, Wide<T> param, u8* __restrict__ codes,
       i64 samples, i64 outer, i64 channels, i64 inner, int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;  // channels a thread works on
  Units<VEC, LAST, BLOCK> unit(samples, outer, channels, inner, shift_x);
  if (!unit.more()) return;
  const Act<S> act{param, S(0), S(0)};
  const S top = S((1 << BITS) - 1);
  const i64 all = samples * channels;
  PerChannel<S, N> a, b, origin, zero, inverse;
  for (i64 sample = -1; unit.more(); unit.next()) {
    const Place<VEC, WIDE, BITS> place(unit);
    if (sample < 0) a = per_value<N>(scale, unit.channel, place.count), b = per_value<N>(shift, unit.channel, place.count);
    if (sample != unit.sample()) {
      sample = unit.sample();
      const i64 at = sample * channels + unit.channel;
      origin = per_value<N>(ranges, at, place.count), zero = per_value<N>(ranges + all, at, place.count);
      inverse = per_value<N>(ranges + 2 * all, at, place.count);
#pragma unroll
      for (int k = 0; k < N; ++k) inverse.v[k] = inverse.v[k] == S(0) ? S(0) : S(1) / inverse.v[k];
    }
    Pack<T, VEC> p = place.values(x), s;
    Pack<u8, VEC> cells;
    if (shortcut) s = place.values(shortcut);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      S y = affine(Stored<T>::up(p.v[k]), a[k], b[k]);
      if (shortcut) y += Stored<T>::up(s.v[k]);
      S cell = round_down((squeeze<ACT>(y, act) - origin[k]) * inverse[k]) + zero[k];
      cell = cell > S(0) ? cell : S(0);  // nan becomes 0
      cells.v[k] = u8((int)(cell < top ? cell : top));
      p.v[k] = Stored<T>::down(activate<ACT>(y, act));
    }
    place.put(out, p);
    place.put_cells(codes, cells);
  }
}

// ------------------------------------------------------------------------------------------------ backward

// The shortcut that the layer added: nothing, a map, or a coded map that its own layer has activated by `number`.
template <typename T> struct Shortcut {
  const T* map;
  const u8* codes;
  const Wide<T>* ranges;
  int number;
  Wide<T> param;
  ABN_FN explicit operator bool() const { return map || codes; }
};
// Values of a unit of it, as the layer read them: those of a coded map are rounded to T, as `decode` does.
template <typename T, int VEC, bool LAST> struct Added {
  Rebuild<Wide<T>, LAST ? VEC : 1> y;
  template <bool WIDE, int BITS, typename U>
  ABN_FN void read(Pack<T, VEC>& out, const Shortcut<T>& from, const Place<VEC, WIDE, BITS>& place, const U& unit,
                   i64 samples) {
    if (from.map) out = place.values(from.map);
    if (!from.codes) return;
    const Act<Wide<T>> act{from.param, Wide<T>(0), Wide<T>(0)};
    y.enter(unit.sample(), from.ranges, samples, unit.channels, unit.channel, place.count);
    const Pack<u8, VEC> cells = place.cells(from.codes);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      const u8 cell = cells.v[k];
      out.v[k] = Stored<T>::down(from.number == LEAKY_RELU ? activate<LEAKY_RELU>(y.template value<LEAKY_RELU>(cell, k, act), act)
                                 : from.number == ELU      ? activate<ELU>(y.template value<ELU>(cell, k, act), act)
                                                           : y.template value<IDENTITY>(cell, k, act));
    }
  }
};

template <typename T, int VEC, bool WIDE, int ACT, int BITS, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_coded_blocks<T, VEC, LAST>())
decode(const u8* __restrict__ codes, const Wide<T>* __restrict__ ranges, T* __restrict__ out, Wide<T> param,
       i64 samples, i64 outer, i64 channels, i64 inner, int shift_x) {
  typedef Wide<T> S;
  Units<VEC, LAST, BLOCK> unit(samples, outer, channels, inner, shift_x);
  const Act<S> act{param, S(0), S(0)};
  Rebuild<S, LAST ? VEC : 1> y;
  for (; unit.more(); unit.next()) {
    const Place<VEC, WIDE, BITS> place(unit);
    y.enter(unit.sample(), ranges, samples, channels, unit.channel, place.count);
    const Pack<u8, VEC> cells = place.cells(codes);
    Pack<T, VEC> p;
#pragma unroll
    for (int k = 0; k < VEC; ++k) p.v[k] = Stored<T>::down(activate<ACT>(y.template value<ACT>(cells.v[k], k, act), act));
    place.put(out, p);
  }
}

// The sums of dy and dy * xhat of every stripe: part, (channels, stripes, 2).
template <typename T, int VEC, bool WIDE, int ACT, int BITS, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_coded_blocks<T, VEC, LAST>())
coded_sums(const u8* __restrict__ codes, const Wide<T>* __restrict__ ranges, const T* __restrict__ dz,
           const T* __restrict__ shortcut, const u8* __restrict__ shortcut_codes,
           const Wide<T>* __restrict__ shortcut_ranges, int shortcut_act, Wide<T> shortcut_param,
           const Wide<T>* __restrict__ center, const Wide<T>* __restrict__ inverse,
           Wide<T> param, Pair<Wide<T>>* __restrict__ part, i64 samples, i64 outer, i64 channels, i64 inner,
           int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;
  Units<VEC, LAST, BLOCK> unit(samples, outer, channels, inner, shift_x);
  const Act<S> act{param, S(0), S(0)};
  const Shortcut<T> from{shortcut, shortcut_codes, shortcut_ranges, shortcut_act, shortcut_param};
  Pair<S> w[N];
#pragma unroll
  for (int k = 0; k < N; ++k) w[k] = Pair<S>{S(0), S(0)};
  if (unit.more()) {
    const int mine = Place<VEC, WIDE, BITS>(unit).count;  // channels, where these are last
    const auto c = per_value<N>(center, unit.channel, mine);
    Rebuild<S, N> y;
    Added<T, VEC, LAST> added;
    for (; unit.more(); unit.next()) {
      const Place<VEC, WIDE, BITS> place(unit);
      y.enter(unit.sample(), ranges, samples, channels, unit.channel, place.count);
      const Pack<u8, VEC> cells = place.cells(codes);
      const Pack<T, VEC> g = place.values(dz);
      Pack<T, VEC> s;
      added.read(s, from, place, unit, samples);
      Pair<S> here{S(0), S(0)};
#pragma unroll
      for (int k = 0; k < VEC; ++k) {
        const S t = y.template value<ACT>(cells.v[k], k, act), dy = Stored<T>::up(g.v[k]) * derivative_at_input<ACT>(t, act);
        const Pair<S> term{dy, dy * ((from ? t - Stored<T>::up(s.v[k]) : t) - c[k])};
        if (LAST) w[k % N] = merge(w[k % N], term);
        else here = merge(here, term);  // each unit by itself first: shorter chains of additions
      }
      if (!LAST) w[0] = merge(w[0], here);
    }
    const auto i = per_value<N>(inverse, unit.channel, mine);
#pragma unroll
    for (int k = 0; k < N; ++k) w[k].b *= i[k];  // the common factor of all xhat of the channel
  }
  write_stripe<BLOCK>(w, (const Walk<1, LAST, BLOCK>*)nullptr, part, unit.channel, channels, shift_x);
}

// dx = factor * (dy - means[0] - xhat * means[1]); dy goes into dshortcut unless that is null. means: (2, channels).
template <typename T, int VEC, bool WIDE, int ACT, int BITS, bool LAST, int BLOCK>
__global__ void __launch_bounds__(BLOCK, fewest_coded_blocks<T, VEC, LAST>())
coded_gradient(const u8* __restrict__ codes, const Wide<T>* __restrict__ ranges, const T* __restrict__ dz,
               const T* __restrict__ shortcut, const u8* __restrict__ shortcut_codes,
               const Wide<T>* __restrict__ shortcut_ranges, int shortcut_act, Wide<T> shortcut_param,
               const Wide<T>* __restrict__ center, const Wide<T>* __restrict__ inverse, Wide<T> param, const Wide<T>* __restrict__ factor,
               const Wide<T>* __restrict__ means, T* __restrict__ dx, T* __restrict__ dshortcut, i64 samples,
               i64 outer, i64 channels, i64 inner, int shift_x) {
  typedef Wide<T> S;
  const int N = LAST ? VEC : 1;
  Units<VEC, LAST, BLOCK> unit(samples, outer, channels, inner, shift_x);
  if (!unit.more()) return;
  const Act<S> act{param, S(0), S(0)};
  const Shortcut<T> from{shortcut, shortcut_codes, shortcut_ranges, shortcut_act, shortcut_param};
  const int mine = Place<VEC, WIDE, BITS>(unit).count;
  const auto c = per_value<N>(center, unit.channel, mine), f = per_value<N>(factor, unit.channel, mine),
             m = per_value<N>(means, unit.channel, mine);
  auto slope = per_value<N>(inverse, unit.channel, mine);  // of xhat * means[1] as a function of t
  const auto m1 = per_value<N>(means + channels, unit.channel, mine);
#pragma unroll
  for (int k = 0; k < N; ++k) slope.v[k] *= m1.v[k];
  Rebuild<S, N> y;
  Added<T, VEC, LAST> added;
  for (; unit.more(); unit.next()) {
    const Place<VEC, WIDE, BITS> place(unit);
    y.enter(unit.sample(), ranges, samples, channels, unit.channel, place.count);
    const Pack<u8, VEC> cells = place.cells(codes);
    const Pack<T, VEC> g = place.values(dz);
    Pack<T, VEC> s, out, through;
    added.read(s, from, place, unit, samples);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
      const S t = y.template value<ACT>(cells.v[k], k, act), dy = Stored<T>::up(g.v[k]) * derivative_at_input<ACT>(t, act);
      out.v[k] = Stored<T>::down(f[k] * (dy - m[k] - ((from ? t - Stored<T>::up(s.v[k]) : t) - c[k]) * slope[k]));
      through.v[k] = Stored<T>::down(dy);
    }
    place.put(dx, out);
    if (dshortcut) place.put(dshortcut, through);
  }
}

}  // namespace abn
