#pragma once
#include "cuda_fp16.h"
struct __nv_bfloat16 { uint16_t raw; };
inline float __bfloat162float(__nv_bfloat16 h) { return emu::unbits<float>((uint64_t)h.raw << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16{emu::float_to_bf16(f)}; }
