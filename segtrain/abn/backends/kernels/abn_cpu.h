// What the CPU libraries share: storage types, shapes, and how work is divided among threads.
#ifndef SEGTRAIN_ABN_CPU_H
#define SEGTRAIN_ABN_CPU_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <vector>
#include "abn_math.h"

using namespace abn;

namespace {

struct bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &wide, 4);
    return v;
  }
  static bfloat16 from(float v) {
    uint32_t wide;
    memcpy(&wide, &v, 4);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return bfloat16{uint16_t(v == v ? rounded : 0x7fc0)};
  }
};
template <typename T> struct Of {
  typedef float S;
  static T down(float v) { return T(v); }
};
template <> struct Of<double> {
  typedef double S;
  static double down(double v) { return v; }
};
template <> struct Of<bfloat16> {
  typedef float S;
  static bfloat16 down(float v) { return bfloat16::from(v); }
};

const long CHUNK = 2048;    // elements of one channel summed in S
const long ROWS = 256;      // rows of a channels-last tensor summed in S
const long PAGE = 4096;     // bytes; rows shorter than this are read one by one, others four at once: CPUs fetch ahead
                            // along few streams in a page
const long ALONE = 1 << 14; // elements below which one thread does it

struct Shape { long outer, channels, inner; long size() const { return outer * channels * inner; } };

inline int team(const Shape& d, int threads) { return d.size() < ALONE || threads < 1 ? 1 : threads; }
// Part i of n of [0, total)
inline long part(long total, int i, int n) { return total / n * i + (total % n < i ? total % n : i); }

template <typename S> Act<S> act_of(double param, double least) {
  return Act<S>{S(param), param == 0 ? S(0) : S(1 / param), S(least)};
}

}  // namespace

// The library is built for one storage type: -DABN_TYPE=float, double, bfloat16 or _Float16 (from GCC 12 on).
typedef ABN_TYPE T;
typedef Of<T>::S S;

#define BY_ACT(CALL)            \
  switch (act) {                \
    case LEAKY_RELU:            \
      CALL(LEAKY_RELU) break;   \
    case ELU:                   \
      CALL(ELU) break;          \
    default:                    \
      CALL(IDENTITY)            \
  }
#endif
