// AdamW (Loshchilov & Hutter 2019) whose moments are bytes with a scale for each block of 256 (Dettmers et al. 2022),
// in one pass over memory: a block's moments are read, moved on, used and rounded again while they are in the L1 cache.
//
// A byte names one of 256 levels whose spacing grows with their size (Dettmers 2016, dynamic 8-bit tree): decade d holds
// 2^d of them (2^(d+1) without a sign), evenly. Counted from zero up, the n-th level has the decade as the exponent of
// n as a float and the place in it as its mantissa, so that both ways are a few instructions and no table of 256 is
// looked up. The twin is `step_by_torch` in adamw8bit.py, which gives the same bits; the tables are made there.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int BLOCK = 256;
constexpr int AHEAD = 2 * BLOCK;  // numbers; fetched while a block is rounded, which leaves memory idle

// Of the levels above zero, by decade and, as the last, for 1: above `least` a number belongs to it; number -> level
// is slope x + start, cut to first and last; level = value_slope m + value_start, for the mantissa m of its number.
struct Levels {
    float least[8], slope[8], start[8], first[8], last[8], value_slope[8], value_start[8];
};

struct Step {
    float beta1, rest1, beta2, rest2, keep, rate, root, eps;  // as `Rates.numbers` says
};

#if defined(__AVX512VNNI__)

// Of 16 numbers at once. A power of two holds at most one border of decades, so that one comparison finds the decade.
// Tables are turned so that they are looked up by what is at hand: the lowest bits of an exponent, the borders below.
template <int BASE>  // exponent of the first decade's first number
struct Wide {
    __m512 border[2], slope, start, value_slope, value_start;
    __m512i decades[2];  // borders below a power of two

    explicit Wide(const Levels& levels) {
        alignas(64) float borders[32], tables[4][16] = {};
        alignas(64) int32_t below[32];
        for (int i = 0; i < 32; ++i) {
            const float from = std::ldexp(1.0f, i - 31);
            borders[i] = INFINITY;
            below[i] = 0;
            for (const float least : levels.least) {
                below[i] += least <= from;
                if (least > from && least < 2 * from) borders[i] = least;
            }
        }
        for (int d = 0; d < 8; ++d) {
            const int exponent = (127 + BASE + d) & 15;
            tables[0][d + 1] = levels.slope[d];
            tables[1][d + 1] = levels.start[d];
            tables[2][exponent] = std::ldexp(levels.value_slope[d], -BASE - d);  // of a number in place of its mantissa
            tables[3][exponent] = levels.value_start[d];
        }
        for (int i = 0; i < 2; ++i) {
            border[i] = _mm512_load_ps(borders + 16 * i);
            decades[i] = _mm512_load_si512(below + 16 * i);
        }
        slope = _mm512_load_ps(tables[0]), start = _mm512_load_ps(tables[1]);
        value_slope = _mm512_load_ps(tables[2]), value_start = _mm512_load_ps(tables[3]);
    }

    // The number of the nearest level to x in [0, 1]; zero has BASE.
    __m512i nearest(__m512 x) const {
        const __m512i unit = _mm512_set1_epi32(1), exponent = _mm512_srli_epi32(_mm512_castps_si512(x), 23);
        const __m512i power = _mm512_subs_epu16(exponent, _mm512_set1_epi32(127 - 31));
        __m512i above = _mm512_permutex2var_epi32(decades[0], power, decades[1]);
        const __mmask16 beyond = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(border[0], power, border[1]), _CMP_GE_OQ);
        above = _mm512_mask_add_epi32(above, beyond, above, unit);
        const __m512 at = _mm512_add_ps(_mm512_mul_ps(x, _mm512_permutexvar_ps(above, slope)),
                                        _mm512_permutexvar_ps(above, start));
        const __m512i after = _mm512_sllv_epi32(_mm512_set1_epi32(1 << BASE), above);
        const __m512i first = _mm512_srli_epi32(after, 1), last = _mm512_sub_epi32(after, unit);
        return _mm512_max_epi32(_mm512_min_epi32(_mm512_cvttps_epi32(at), last), first);
    }

    // The level with this number, or zero where `some` is not set.
    __m512 level(__m512i number, __mmask16 some) const {
        const __m512 x = _mm512_cvtepi32_ps(number);
        const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(x), 23);
        return _mm512_maskz_add_ps(some, _mm512_mul_ps(_mm512_permutexvar_ps(exponent, value_slope), x),
                                   _mm512_permutexvar_ps(exponent, value_start));
    }
};

inline __m512i bytes(const uint8_t* from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)); }

void block(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_scale, float* v_scale, const Step& s,
           const Wide<0>& with_sign, const Wide<1>& without) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN), zero = _mm512_set1_epi32(127), unit = _mm512_set1_epi32(1);
    alignas(64) float ms[BLOCK], vs[BLOCK];
    __m512i m_top = _mm512_setzero_si512(), v_top = _mm512_setzero_si512();  // of bits, so that NaN is above all else
    const __m512 m_old = _mm512_set1_ps(*m_scale), v_old = _mm512_set1_ps(*v_scale);
    for (int i = 0; i < BLOCK; i += 16) {
        const __m512 grad = _mm512_loadu_ps(g + i);
        const __m512i m_code = _mm512_sub_epi32(bytes(m + i), zero), v_code = bytes(v + i);
        __m512 first = with_sign.level(_mm512_abs_epi32(m_code), _mm512_test_epi32_mask(m_code, m_code));
        first = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(first), m_code, sign, 0x78));  // a ^ b & c
        __m512 second = without.level(_mm512_add_epi32(v_code, unit), _mm512_test_epi32_mask(v_code, v_code));
        first = _mm512_mul_ps(first, m_old);
        second = _mm512_mul_ps(second, v_old);
        first = _mm512_add_ps(_mm512_mul_ps(first, _mm512_set1_ps(s.beta1)),
                              _mm512_mul_ps(grad, _mm512_set1_ps(s.rest1)));
        second = _mm512_add_ps(_mm512_mul_ps(second, _mm512_set1_ps(s.beta2)),
                               _mm512_mul_ps(_mm512_mul_ps(grad, grad), _mm512_set1_ps(s.rest2)));
        const __m512 below = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(second), _mm512_set1_ps(s.root)),
                                           _mm512_set1_ps(s.eps));
        const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(p + i), _mm512_set1_ps(s.keep));
        _mm512_storeu_ps(
            p + i, _mm512_sub_ps(kept, _mm512_mul_ps(_mm512_div_ps(first, below), _mm512_set1_ps(s.rate))));
        _mm512_store_ps(ms + i, first);
        _mm512_store_ps(vs + i, second);
        m_top = _mm512_max_epu32(m_top, _mm512_andnot_si512(sign, _mm512_castps_si512(first)));
        v_top = _mm512_max_epu32(v_top, _mm512_castps_si512(second));
    }
    *m_scale = __builtin_bit_cast(float, _mm512_reduce_max_epu32(m_top));
    *v_scale = __builtin_bit_cast(float, _mm512_reduce_max_epu32(v_top));
    const __m512 m_share = _mm512_set1_ps(1.0f / std::max(*m_scale, 1e-38f));
    const __m512 v_share = _mm512_set1_ps(1.0f / std::max(*v_scale, 1e-38f));
    for (int i = 0; i < BLOCK; i += 16) {
        _mm_prefetch((const char*)(p + AHEAD + i), _MM_HINT_T0);
        _mm_prefetch((const char*)(g + AHEAD + i), _MM_HINT_T0);
        _mm_prefetch((const char*)(m + AHEAD + i), _MM_HINT_T0);
        _mm_prefetch((const char*)(v + AHEAD + i), _MM_HINT_T0);
        const __m512i first = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(ms + i), m_share));
        const __m512i number = with_sign.nearest(_mm512_castsi512_ps(_mm512_andnot_si512(sign, first)));
        __m512i code = _mm512_add_epi32(zero, number);
        code = _mm512_mask_sub_epi32(code, _mm512_test_epi32_mask(first, sign), zero, _mm512_min_epi32(number, zero));
        _mm_storeu_si128((__m128i*)(m + i), _mm512_cvtepi32_epi8(code));
        const __m512 second = _mm512_load_ps(vs + i);
        const __mmask16 some = _mm512_cmp_ps_mask(second, _mm512_setzero_ps(), _CMP_GT_OQ);
        __m512i of_v = without.nearest(_mm512_mul_ps(second, v_share));
        of_v = _mm512_mask_max_epi32(of_v, some, of_v, _mm512_set1_epi32(2));  // never to zero
        _mm_storeu_si128((__m128i*)(v + i), _mm512_cvtepi32_epi8(_mm512_sub_epi32(of_v, unit)));
    }
}

template <int BASE>
using Tables = Wide<BASE>;

#else

inline __m256 entry(const float* table, __m256i index) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
}

// The number of the nearest level to x in [0, 1], from 0.
inline __m256i nearest(__m256 x, const Levels& levels) {
    __m256i above = _mm256_setzero_si256();
    for (int i = 0; i < 8; ++i)
        above = _mm256_sub_epi32(
            above, _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_set1_ps(levels.least[i]), _CMP_GE_OQ)));
    const __m256i decade = _mm256_sub_epi32(above, _mm256_set1_epi32(1));
    const __m256 at = _mm256_add_ps(_mm256_mul_ps(x, entry(levels.slope, decade)), entry(levels.start, decade));
    const __m256 cut = _mm256_max_ps(_mm256_min_ps(at, entry(levels.last, decade)), entry(levels.first, decade));
    const __m256i is_zero = _mm256_cmpeq_epi32(above, _mm256_setzero_si256());
    return _mm256_andnot_si256(is_zero, _mm256_cvttps_epi32(cut));
}

// The level with this number; `base` is the exponent of the first decade's.
inline __m256 level(__m256i number, int base, const Levels& levels) {
    const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(number));
    const __m256i decade = _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127 + base));
    const __m256 mantissa = _mm256_castsi256_ps(
        _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)), _mm256_set1_epi32(0x3f800000)));
    return _mm256_add_ps(_mm256_mul_ps(entry(levels.value_slope, decade), mantissa),
                         entry(levels.value_start, decade));
}

inline __m256i bytes(const uint8_t* from) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }

inline void store_bytes(uint8_t* to, __m256i x) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
}

inline float largest(__m256 x) {  // of bits, so that NaN is above all else
    const __m256i bits = _mm256_castps_si256(x);
    __m128i top = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0x4e));
    top = _mm_max_epu32(top, _mm_shuffle_epi32(top, 0xb1));
    return __builtin_bit_cast(float, _mm_cvtsi128_si32(top));
}

void block(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_scale, float* v_scale, const Step& s,
           const Levels& with_sign, const Levels& without) {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    const __m256i zero = _mm256_set1_epi32(127), all = _mm256_set1_epi32(255), unit = _mm256_set1_epi32(1);
    alignas(32) float ms[BLOCK], vs[BLOCK];
    __m256 m_top = _mm256_setzero_ps(), v_top = _mm256_setzero_ps();
    const __m256 m_old = _mm256_set1_ps(*m_scale), v_old = _mm256_set1_ps(*v_scale);
    for (int i = 0; i < BLOCK; i += 8) {
        const __m256 grad = _mm256_loadu_ps(g + i);
        const __m256i m_code = _mm256_sub_epi32(bytes(m + i), zero), v_code = bytes(v + i);
        const __m256i m_number = _mm256_abs_epi32(m_code);
        __m256 first = level(m_number, 0, with_sign);
        first = _mm256_xor_ps(first, _mm256_and_ps(_mm256_castsi256_ps(m_code), sign));
        first = _mm256_andnot_ps(
            _mm256_castsi256_ps(_mm256_cmpeq_epi32(m_number, _mm256_setzero_si256())), first);
        __m256 second = level(_mm256_add_epi32(v_code, unit), 1, without);
        second = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(v_code, _mm256_setzero_si256())), second);
        first = _mm256_mul_ps(first, m_old);
        second = _mm256_mul_ps(second, v_old);
        first = _mm256_add_ps(_mm256_mul_ps(first, _mm256_set1_ps(s.beta1)),
                              _mm256_mul_ps(grad, _mm256_set1_ps(s.rest1)));
        second = _mm256_add_ps(_mm256_mul_ps(second, _mm256_set1_ps(s.beta2)),
                               _mm256_mul_ps(_mm256_mul_ps(grad, grad), _mm256_set1_ps(s.rest2)));
        const __m256 below = _mm256_add_ps(_mm256_mul_ps(_mm256_sqrt_ps(second), _mm256_set1_ps(s.root)),
                                           _mm256_set1_ps(s.eps));
        const __m256 kept = _mm256_mul_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(s.keep));
        _mm256_storeu_ps(
            p + i, _mm256_sub_ps(kept, _mm256_mul_ps(_mm256_div_ps(first, below), _mm256_set1_ps(s.rate))));
        _mm256_store_ps(ms + i, first);
        _mm256_store_ps(vs + i, second);
        m_top = _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(m_top),
                                                     _mm256_castps_si256(_mm256_andnot_ps(sign, first))));
        v_top = _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(v_top), _mm256_castps_si256(second)));
    }
    *m_scale = largest(m_top);
    *v_scale = largest(v_top);
    const __m256 m_share = _mm256_div_ps(one, _mm256_set1_ps(std::max(*m_scale, 1e-38f)));
    const __m256 v_share = _mm256_div_ps(one, _mm256_set1_ps(std::max(*v_scale, 1e-38f)));
    for (int i = 0; i < BLOCK; i += 8) {
        const __m256 first = _mm256_mul_ps(_mm256_load_ps(ms + i), m_share);
        const __m256i number = nearest(_mm256_andnot_ps(sign, first), with_sign);
        const __m256i negative = _mm256_srai_epi32(_mm256_castps_si256(first), 31);
        const __m256i down = _mm256_sub_epi32(zero, _mm256_min_epi32(number, zero)), up = _mm256_add_epi32(zero, number);
        store_bytes(m + i, _mm256_blendv_epi8(up, down, negative));
        const __m256 second = _mm256_load_ps(vs + i);
        const __m256i some = _mm256_castps_si256(_mm256_cmp_ps(second, _mm256_setzero_ps(), _CMP_GT_OQ));
        __m256i of_v = nearest(_mm256_mul_ps(second, v_share), without);
        of_v = _mm256_max_epi32(of_v, _mm256_and_si256(some, _mm256_set1_epi32(2)));  // never to zero
        store_bytes(v + i, _mm256_min_epi32(_mm256_sub_epi32(_mm256_max_epi32(of_v, unit), unit), all));
    }
}

template <int BASE>
struct Tables : Levels {
    explicit Tables(const Levels& levels) : Levels(levels) {}
};

#endif

}  // namespace

extern "C" void tlm_adamw8bit(float* p, const float* g, uint8_t* m, uint8_t* v, float* m_scales, float* v_scales,
                              long count, const float* step, const float* levels, int threads) {
    Step s;
    Levels both[2];
    std::memcpy(&s, step, sizeof s);
    std::memcpy(both, levels, sizeof both);
    const Tables<0> with_sign(both[0]);
    const Tables<1> without(both[1]);
    const long whole = count / BLOCK, rest = count % BLOCK;
    const unsigned mode = _mm_getcsr();  // whether denormals are flushed, which each thread has for itself
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _mm_setcsr(mode);
#pragma omp for schedule(static)
        for (long b = 0; b < whole; ++b) {
            const long at = b * BLOCK;
            block(p + at, g + at, m + at, v + at, m_scales + b, v_scales + b, s, with_sign, without);
        }
    }
    if (rest) {  // filled up with zeros
        const long at = whole * BLOCK;
        float ps[BLOCK] = {}, gs[BLOCK] = {};
        uint8_t ms[BLOCK], vs[BLOCK] = {};
        std::memset(ms, 127, BLOCK);
        std::copy_n(p + at, rest, ps);
        std::copy_n(g + at, rest, gs);
        std::copy_n(m + at, rest, ms);
        std::copy_n(v + at, rest, vs);
        block(ps, gs, ms, vs, m_scales + whole, v_scales + whole, s, with_sign, without);
        std::copy_n(ps, rest, p + at);
        std::copy_n(ms, rest, m + at);
        std::copy_n(vs, rest, v + at);
    }
}
