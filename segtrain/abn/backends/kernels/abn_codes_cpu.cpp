// Maps coded in 8 or 4 bits, on the CPU: writes them, rebuilds them, and runs backward from them. The format and the
// meaning of every function: codes.py. Compiled at first use by native.py, one library for each storage type.
#include "abn_cpu.h"

namespace {

// A coded map: (outer, channels, inner) as in abn_cpu.cpp, of `samples` samples; `planes` is 1, or samples where every
// sample has ranges of its own.
struct Map {
  long outer, channels, inner, samples, planes;
  int bits;
  bool last() const { return inner == 1; }
  long rows() const { return last() ? outer : outer * channels; }
  long length() const { return last() ? channels : inner; }
  long bytes() const { return (length() * bits + 7) / 8; }
  Shape shape() const { return Shape{outer, channels, inner}; }
  // Index of the (first) range of a row.
  long range(long row) const {
    const long sample = last() ? row / (outer / samples) : row / channels;
    return (planes == 1 ? 0 : sample * channels) + (last() ? 0 : row % channels);
  }
};

// Cell numbers of `count` values of a row, the first of which has an even place: 8-bit codes themselves, or `room`
// filled from 4-bit ones.
inline const uint8_t* cells(const uint8_t* row, long first, long count, int bits, uint8_t* room) {
  if (bits == 8) return row + first;
  const uint8_t* p = row + first / 2;
#pragma omp simd
  for (long k = 0; k < count / 2; ++k) {
    room[2 * k] = p[k] & 15;
    room[2 * k + 1] = p[k] >> 4;
  }
  if (count & 1) room[count - 1] = p[count / 2] & 15;
  return room;
}

// Value k is affected by coefficient k where channels are last, by the one coefficient of its plane else.
template <bool LAST, typename S> inline S pick(const S* p, long k) { return p[LAST ? k : 0]; }

// y = unsqueeze(step * cell + offset)
template <typename S> struct Rebuild {
  std::vector<S> step, offset;
  Rebuild() {}
  Rebuild(const S* ranges, const Map& m) : step(m.planes * m.channels), offset(m.planes * m.channels) {
    const long n = m.planes * m.channels;
    for (long i = 0; i < n; ++i) {
      step[i] = ranges[2 * n + i];
      offset[i] = ranges[i] + (S(0.5) - ranges[n + i]) * step[i];
    }
  }
};

// ------------------------------------------------------------------------------------------------ ranges

// Smallest and largest y of a run; `odd` becomes nan where a value is infinite or nan.
template <bool SHORTCUT, typename T, typename S>
inline void run_extremes(const T* x, const T* shortcut, long count, S scale, S shift, S* low, S* high, S* odd) {
  S l = *low, h = *high, o = 0;
#pragma omp simd reduction(min : l) reduction(max : h) reduction(+ : o)
  for (long k = 0; k < count; ++k) {
    S y = S(x[k]) * scale + shift;
    if (SHORTCUT) y += S(shortcut[k]);
    l = y < l ? y : l;
    h = y > h ? y : h;
    o += y - y;
  }
  *low = l;
  *high = h;
  *odd += o;
}
template <bool SHORTCUT, typename T, typename S>
inline void row_extremes(const T* x, const T* shortcut, long count, const S* scale, const S* shift, S* low, S* high,
                         S* odd) {
#pragma omp simd
  for (long k = 0; k < count; ++k) {
    S y = S(x[k]) * scale[k] + shift[k];
    if (SHORTCUT) y += S(shortcut[k]);
    low[k] = y < low[k] ? y : low[k];
    high[k] = y > high[k] ? y : high[k];
    odd[k] += y - y;
  }
}

template <typename S> void finish_range(S low, S high, S odd, int bits, S tiny, S* origin, S* zero, S* step) {
  const S wide = high - low;
  S size = wide / S((1 << bits) - 1);
  if (!(size >= tiny)) size = 0;  // a constant: one cell
  const bool both = low < 0 && high > 0 && size > 0;
  *origin = both ? S(0) : low;
  *zero = both ? ceil(-low / size) : S(0);
  *step = size;
  if (odd != odd || wide - wide != 0) *origin = *zero = *step = S(NAN);
}

// Ranges of a shortcut in its own layer's codes, or null.
template <typename S> struct Known {
  const S* ranges;
  int act;
  S param;
};

template <int ACT, bool SHORTCUT, typename T, typename S>
void find_ranges(const T* x, const T* shortcut, const Map& m, const S* scale, const S* shift, S tiny, S* ranges,
                 const Act<S>& a, const Known<S>& known, int threads) {
  const long n = m.planes * m.channels;
  const int team_size = team(m.shape(), threads);
  std::vector<S> found(size_t(3) * n * (m.last() ? team_size : 1));
  for (size_t i = 0; i < found.size(); ++i) {
    const long kind = long(i) / n % 3;
    found[i] = kind == 0 ? S(INFINITY) : kind == 1 ? -S(INFINITY) : S(0);
  }
  if (m.last()) {
#pragma omp parallel for num_threads(team_size) schedule(static, 1)
    for (int i = 0; i < team_size; ++i) {
      S* own = &found[size_t(3) * n * i];
      for (long row = part(m.outer, i, team_size); row < part(m.outer, i + 1, team_size); ++row) {
        const long at = row * m.channels, r = m.range(row);
        row_extremes<SHORTCUT>(x + at, SHORTCUT ? shortcut + at : nullptr, m.channels, scale, shift, own + r,
                               own + n + r, own + 2 * n + r);
      }
    }
    for (int i = 1; i < team_size; ++i)
      for (long r = 0; r < n; ++r) {
        const S* own = &found[size_t(3) * n * i];
        found[r] = own[r] < found[r] ? own[r] : found[r];
        found[n + r] = own[n + r] > found[n + r] ? own[n + r] : found[n + r];
        found[2 * n + r] += own[2 * n + r];
      }
  } else {
#pragma omp parallel for num_threads(team_size) schedule(static)
    for (long c = 0; c < m.channels; ++c)
      for (long row = c; row < m.rows(); row += m.channels) {
        const long at = row * m.inner, r = m.range(row);
        run_extremes<SHORTCUT>(x + at, SHORTCUT ? shortcut + at : nullptr, m.inner, scale[c], shift[c], &found[r],
                               &found[n + r], &found[2 * n + r]);
      }
  }
  for (long r = 0; r < n; ++r) {
    S low = found[r], high = found[n + r];
    if (known.ranges) {
      S least, most;
      bounds_of_range(known.act, known.ranges[r], known.ranges[n + r], known.ranges[2 * n + r], S(1 << m.bits),
                      known.param, &least, &most);
      low += least, high += most;
    }
    finish_range(squeeze<ACT>(low, a), squeeze<ACT>(high, a), found[2 * n + r], m.bits, tiny, ranges + r,
                 ranges + n + r, ranges + 2 * n + r);
  }
}

// ------------------------------------------------------------------------------------------------ forward

// The codes of a row, and out = act(y). Coefficients are pointers to that of the row's first value.
template <int ACT, bool LAST, bool SHORTCUT, typename T, typename S>
inline void encode_run(const T* x, const T* shortcut, T* out, uint8_t* cell, long count, const S* scale,
                       const S* shift, const S* origin, const S* zero, const S* inverse, S top, const Act<S>& a) {
#pragma omp simd
  for (long k = 0; k < count; ++k) {
    S y = S(x[k]) * pick<LAST>(scale, k) + pick<LAST>(shift, k);
    if (SHORTCUT) y += S(shortcut[k]);
    S q = floor((squeeze<ACT>(y, a) - pick<LAST>(origin, k)) * pick<LAST>(inverse, k)) + pick<LAST>(zero, k);
    q = q > 0 ? q : S(0);  // nan becomes 0
    q = q < top ? q : top;
    cell[k] = uint8_t(int(q));
    out[k] = Of<T>::down(activate<ACT>(y, a));
  }
}

template <int ACT, bool SHORTCUT, typename T, typename S>
void encode(const T* x, const T* shortcut, T* out, uint8_t* codes, const Map& m, const S* scale, const S* shift,
            const S* ranges, const Act<S>& a, int threads) {
  const long n = m.planes * m.channels, piece = m.last() ? m.channels : CHUNK;
  const S *origin = ranges, *zero = ranges + n;
  std::vector<S> inverse(n);
  for (long i = 0; i < n; ++i) inverse[i] = ranges[2 * n + i] == 0 ? S(0) : 1 / ranges[2 * n + i];
  const S top = S((1 << m.bits) - 1);
  const int team_size = team(m.shape(), threads);
#pragma omp parallel for num_threads(team_size) schedule(static, 1)
  for (int i = 0; i < team_size; ++i) {
    std::vector<uint8_t> room(piece);
    for (long row = part(m.rows(), i, team_size); row < part(m.rows(), i + 1, team_size); ++row) {
      const long r = m.range(row), c = m.last() ? 0 : row % m.channels;
      uint8_t* to = codes + row * m.bytes();
      for (long first = 0; first < m.length(); first += piece) {
        const long count = m.length() - first < piece ? m.length() - first : piece, at = row * m.length() + first;
        uint8_t* cell = m.bits == 8 ? to + first : &room[0];
        const T* s = SHORTCUT ? shortcut + at : nullptr;
        if (m.last())
          encode_run<ACT, true, SHORTCUT>(x + at, s, out + at, cell, count, scale, shift, origin + r, zero + r,
                                          &inverse[r], top, a);
        else
          encode_run<ACT, false, SHORTCUT>(x + at, s, out + at, cell, count, scale + c, shift + c, origin + r,
                                           zero + r, &inverse[r], top, a);
        if (m.bits == 8) continue;
        uint8_t* p = to + first / 2;
#pragma omp simd
        for (long k = 0; k < count / 2; ++k) p[k] = uint8_t(cell[2 * k] | cell[2 * k + 1] << 4);
        if (count & 1) p[count / 2] = cell[count - 1];
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ backward

template <int ACT, bool LAST, typename T, typename S>
inline void decode_run(const uint8_t* cell, T* out, long count, const S* step, const S* offset, const Act<S>& a) {
#pragma omp simd
  for (long k = 0; k < count; ++k)
    out[k] = Of<T>::down(activate<ACT>(unsqueeze<ACT>(S(cell[k]) * pick<LAST>(step, k) + pick<LAST>(offset, k), a), a));
}

template <int ACT, typename T, typename S>
void decode(const uint8_t* codes, T* out, const Map& m, const S* ranges, const Act<S>& a, int threads) {
  const Rebuild<S> y(ranges, m);
  const long piece = m.last() ? m.channels : CHUNK;
  const int team_size = team(m.shape(), threads);
#pragma omp parallel for num_threads(team_size) schedule(static, 1)
  for (int i = 0; i < team_size; ++i) {
    std::vector<uint8_t> room(piece);
    for (long row = part(m.rows(), i, team_size); row < part(m.rows(), i + 1, team_size); ++row)
      for (long first = 0, r = m.range(row); first < m.length(); first += piece) {
        const long count = m.length() - first < piece ? m.length() - first : piece;
        const uint8_t* cell = cells(codes + row * m.bytes(), first, count, m.bits, &room[0]);
        T* to = out + row * m.length() + first;
        if (m.last()) decode_run<ACT, true>(cell, to, count, &y.step[r], &y.offset[r], a);
        else decode_run<ACT, false>(cell, to, count, &y.step[r], &y.offset[r], a);
      }
  }
}

// The shortcut that the layer added: nothing, a map, or a coded map that its own layer has activated by `act`.
template <typename T, typename S> struct Added {
  const T* map;
  const uint8_t* codes;
  int act;
  Act<S> a;
  Rebuild<S> y;
  Added(const T* map, const uint8_t* codes, const S* ranges, int act, double param, const Map& m)
      : map(map), codes(codes), act(act), a(act_of<S>(param, 0)) {
    if (codes) y = Rebuild<S>(ranges, m);
  }
  explicit operator bool() const { return map || codes; }
  // Its values beside `count` values of a row: in place, or as `decode` gives them, in `room`.
  const T* run(const Map& m, long row, long first, long count, T* room, uint8_t* cell_room) const {
    if (!codes) return map + row * m.length() + first;
    const uint8_t* cell = cells(codes + row * m.bytes(), first, count, m.bits, cell_room);
    const long r = m.range(row);
#define CALL(ACT)                                                                              \
  if (m.last()) { decode_run<ACT, true>(cell, room, count, &y.step[r], &y.offset[r], a); }     \
  else { decode_run<ACT, false>(cell, room, count, &y.step[r], &y.offset[r], a); }
    BY_ACT(CALL)
#undef CALL
    return room;
  }
};

// Adds the sums of dy and dy * (y - shortcut - center) of a run: to one pair of numbers, or to one for each value.
template <int ACT, bool LAST, bool SHORTCUT, typename T, typename S>
inline void sums_run(const uint8_t* cell, const T* dz, const T* shortcut, long count, const S* step, const S* offset,
                     const S* center, const Act<S>& a, S* sum_dy, S* sum_dyx) {
  S s = 0, q = 0;
  if (LAST) {
#pragma omp simd
    for (long k = 0; k < count; ++k) {
      const S y = unsqueeze<ACT>(S(cell[k]) * step[k] + offset[k], a), dy = S(dz[k]) * derivative_at_input<ACT>(y, a);
      sum_dy[k] += dy;
      sum_dyx[k] += dy * ((SHORTCUT ? y - S(shortcut[k]) : y) - center[k]);
    }
    return;
  }
#pragma omp simd reduction(+ : s, q)
  for (long k = 0; k < count; ++k) {
    const S y = unsqueeze<ACT>(S(cell[k]) * step[0] + offset[0], a), dy = S(dz[k]) * derivative_at_input<ACT>(y, a);
    s += dy;
    q += dy * ((SHORTCUT ? y - S(shortcut[k]) : y) - center[0]);
  }
  *sum_dy = s;
  *sum_dyx = q;
}

// result: (2, channels), the sums of dy and of dy * xhat.
template <int ACT, bool SHORTCUT, typename T, typename S>
void sums(const uint8_t* codes, const T* dz, const Added<T, S>& shortcut, const Map& m, const S* ranges, const S* center,
          const S* inverse, const Act<S>& a, S* result, int threads) {
  const Rebuild<S> y(ranges, m);
  const long channels = m.channels;
  const int team_size = team(m.shape(), threads);
  if (m.last()) {
    std::vector<double> parts(size_t(team_size) * 2 * channels);
#pragma omp parallel for num_threads(team_size) schedule(static, 1)
    for (int i = 0; i < team_size; ++i) {
      const long first = part(m.outer, i, team_size), last = part(m.outer, i + 1, team_size);
      std::vector<S> own(2 * channels);
      std::vector<uint8_t> room(channels), other(channels);
      std::vector<T> values(channels);
      double* all = &parts[size_t(i) * 2 * channels];
      for (long to = last, from; to > first; to = from) {
        from = to - first < ROWS ? first : to - ROWS;
        for (long k = 0; k < 2 * channels; ++k) own[k] = 0;
        for (long row = from; row < to; ++row) {
          const long at = row * channels, r = m.range(row);
          sums_run<ACT, true, SHORTCUT>(cells(codes + row * m.bytes(), 0, channels, m.bits, &room[0]), dz + at,
                                        SHORTCUT ? shortcut.run(m, row, 0, channels, &values[0], &other[0]) : nullptr,
                                        channels, &y.step[r], &y.offset[r], center, a, &own[0], &own[channels]);
        }
        for (long k = 0; k < 2 * channels; ++k) all[k] += double(own[k]);
      }
    }
    for (long k = 0; k < 2 * channels; ++k) {
      double all = 0;
      for (int i = 0; i < team_size; ++i) all += parts[size_t(i) * 2 * channels + k];
      result[k] = S(k < channels ? all : all * double(inverse[k - channels]));
    }
    return;
  }
#pragma omp parallel for num_threads(team_size) schedule(static)
  for (long c = 0; c < channels; ++c) {
    double all_dy = 0, all_dyx = 0;
    uint8_t room[CHUNK], other[CHUNK];
    T values[CHUNK];
    for (long row = c; row < m.rows(); row += channels)
      for (long first = 0, r = m.range(row); first < m.inner; first += CHUNK) {
        const long count = m.inner - first < CHUNK ? m.inner - first : CHUNK, at = row * m.inner + first;
        S s, q;
        sums_run<ACT, false, SHORTCUT>(cells(codes + row * m.bytes(), first, count, m.bits, room), dz + at,
                                       SHORTCUT ? shortcut.run(m, row, first, count, values, other) : nullptr, count,
                                       &y.step[r], &y.offset[r], center + c, a, &s, &q);
        all_dy += s;
        all_dyx += q;
      }
    result[c] = S(all_dy);
    result[channels + c] = S(all_dyx * double(inverse[c]));
  }
}

// dx = factor * (dy - mean_dy - xhat * mean_dyx), and dy into dshortcut unless that is null.
template <int ACT, bool LAST, bool SHORTCUT, typename T, typename S>
inline void gradient_run(const uint8_t* cell, const T* dz, const T* shortcut, T* dx, T* dshortcut, long count,
                         const S* step, const S* offset, const S* center, const S* inverse, const S* factor,
                         const S* mean_dy, const S* mean_dyx, const Act<S>& a) {
#pragma omp simd
  for (long k = 0; k < count; ++k) {
    const S y = unsqueeze<ACT>(S(cell[k]) * pick<LAST>(step, k) + pick<LAST>(offset, k), a);
    const S dy = S(dz[k]) * derivative_at_input<ACT>(y, a), t = SHORTCUT ? y - S(shortcut[k]) : y;
    dx[k] = Of<T>::down(pick<LAST>(factor, k) * (dy - pick<LAST>(mean_dy, k) -
                                                 (t - pick<LAST>(center, k)) * pick<LAST>(inverse, k) *
                                                     pick<LAST>(mean_dyx, k)));
  }
  if (!dshortcut) return;
#pragma omp simd
  for (long k = 0; k < count; ++k) {
    const S y = unsqueeze<ACT>(S(cell[k]) * pick<LAST>(step, k) + pick<LAST>(offset, k), a);
    dshortcut[k] = Of<T>::down(S(dz[k]) * derivative_at_input<ACT>(y, a));
  }
}

template <int ACT, bool SHORTCUT, typename T, typename S>
void gradient(const uint8_t* codes, const T* dz, const Added<T, S>& shortcut, T* dx, T* dshortcut, const Map& m,
              const S* ranges, const S* center, const S* inverse, const S* factor, const S* means, const Act<S>& a,
              int threads) {
  const Rebuild<S> y(ranges, m);
  const long piece = m.last() ? m.channels : CHUNK;
  const int team_size = team(m.shape(), threads);
#pragma omp parallel for num_threads(team_size) schedule(static, 1)
  for (int i = 0; i < team_size; ++i) {
    std::vector<uint8_t> room(piece), other(piece);
    std::vector<T> values(piece);
    for (long row = part(m.rows(), i, team_size); row < part(m.rows(), i + 1, team_size); ++row)
      for (long first = 0, r = m.range(row), c = m.last() ? 0 : row % m.channels; first < m.length(); first += piece) {
        const long count = m.length() - first < piece ? m.length() - first : piece, at = row * m.length() + first;
        const uint8_t* cell = cells(codes + row * m.bytes(), first, count, m.bits, &room[0]);
        const T* s = SHORTCUT ? shortcut.run(m, row, first, count, &values[0], &other[0]) : nullptr;
        T* ds = dshortcut ? dshortcut + at : nullptr;
        if (m.last())
          gradient_run<ACT, true, SHORTCUT>(cell, dz + at, s, dx + at, ds, count, &y.step[r], &y.offset[r], center,
                                            inverse, factor, means, means + m.channels, a);
        else
          gradient_run<ACT, false, SHORTCUT>(cell, dz + at, s, dx + at, ds, count, &y.step[r], &y.offset[r],
                                             center + c, inverse + c, factor + c, means + c, means + m.channels + c, a);
      }
  }
}

}  // namespace

#define BY_SHORTCUT(NAME, ADDED, ACT, ...)             \
  if (ADDED) { NAME<ACT, true>(__VA_ARGS__); }         \
  else { NAME<ACT, false>(__VA_ARGS__); }

extern "C" {

// Fills ranges, then codes and out = act(scale * x + shift (+ shortcut)); out may be x. shortcut_ranges: null, or those
// of the shortcut in its own layer's codes.
void abn_encode(const T* x, const T* shortcut, T* out, uint8_t* codes, long outer, long channels, long inner,
                long samples, long planes, int bits, const S* scale, const S* shift, S* ranges, int act, double param,
                double least, double tiny, const S* shortcut_ranges, int shortcut_act, double shortcut_param,
                int threads) {
  const Map m{outer, channels, inner, samples, planes, bits};
  const Act<S> a = act_of<S>(param, least);
  const Known<S> known{shortcut_ranges, shortcut_act, S(shortcut_param)};
  const bool read = shortcut && !shortcut_ranges;
#define CALL(ACT)                                                                                         \
  BY_SHORTCUT(find_ranges, read, ACT, x, shortcut, m, scale, shift, S(tiny), ranges, a, known, threads)   \
  BY_SHORTCUT(encode, shortcut, ACT, x, shortcut, out, codes, m, scale, shift, ranges, a, threads)
  BY_ACT(CALL)
#undef CALL
}

void abn_decode(const uint8_t* codes, T* out, long outer, long channels, long inner, long samples, long planes,
                int bits, const S* ranges, int act, double param, double least, int threads) {
  const Map m{outer, channels, inner, samples, planes, bits};
  const Act<S> a = act_of<S>(param, least);
#define CALL(ACT) decode<ACT>(codes, out, m, ranges, a, threads);
  BY_ACT(CALL)
#undef CALL
}

void abn_coded_sums(const uint8_t* codes, const T* dz, const T* shortcut, const uint8_t* shortcut_codes,
                    const S* shortcut_ranges, int shortcut_act, double shortcut_param, long outer, long channels,
                    long inner, long samples, long planes, int bits, const S* ranges, const S* center, const S* inverse, int act,
                    double param, double least, S* result, int threads) {
  const Map m{outer, channels, inner, samples, planes, bits};
  const Act<S> a = act_of<S>(param, least);
  const Added<T, S> added(shortcut, shortcut_codes, shortcut_ranges, shortcut_act, shortcut_param, m);
#define CALL(ACT) BY_SHORTCUT(sums, added, ACT, codes, dz, added, m, ranges, center, inverse, a, result, threads)
  BY_ACT(CALL)
#undef CALL
}

void abn_coded_gradient(const uint8_t* codes, const T* dz, const T* shortcut, const uint8_t* shortcut_codes,
                        const S* shortcut_ranges, int shortcut_act, double shortcut_param, T* dx, T* dshortcut, long outer,
                        long channels, long inner, long samples, long planes, int bits, const S* ranges,
                        const S* center, const S* inverse, const S* factor, const S* means, int act, double param,
                        double least, int threads) {
  const Map m{outer, channels, inner, samples, planes, bits};
  const Act<S> a = act_of<S>(param, least);
  const Added<T, S> added(shortcut, shortcut_codes, shortcut_ranges, shortcut_act, shortcut_param, m);
#define CALL(ACT)                                                                                                      \
  BY_SHORTCUT(gradient, added, ACT, codes, dz, added, dx, dshortcut, m, ranges, center, inverse, factor, means, a, threads)
  BY_ACT(CALL)
#undef CALL
}

}  // extern "C"
