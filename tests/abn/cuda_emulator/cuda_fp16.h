#pragma once
#include "cuda_emu.h"
// binary16 and bfloat16 as storage types: round to nearest even, through the bits.
namespace emu {
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return unbits<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float v = (float)fraction * 0x1p-24f;
    return sign ? -v : v;
  }
  return unbits<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t float_to_half(float f) {
  const uint32_t b = (uint32_t)bits(f), a = b & 0x7fffffffu;
  const uint16_t sign = b >> 16 & 0x8000;
  if (a > 0x7f800000u) return 0x7fff;              // NaN, as the device writes it
  if (a >= 0x477ff000u) return sign | 0x7c00;      // rounds past 65504
  if (a < 0x38800000u) {                           // subnormal
    const float m = unbits<float>(a) * 0x1p24f;
    return sign | (uint16_t)(uint32_t)nearbyintf(m);
  }
  return sign | (uint16_t)((a + 0xfffu + (a >> 13 & 1) - 0x38000000u) >> 13);
}
inline uint16_t float_to_bf16(float f) {
  const uint32_t b = (uint32_t)bits(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (uint16_t)((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
}  // namespace emu
struct __half { uint16_t raw; };
inline float __half2float(__half h) { return emu::half_to_float(h.raw); }
inline __half __float2half_rn(float f) { return __half{emu::float_to_half(f)}; }
