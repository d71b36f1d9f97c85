// A Linear of integers: rows of float32 are quantised to int8, multiplied with weights of 8, 2 or 1 bits, and what comes
// out is scaled, shifted by a bias and sent through an activation, without a look at memory in between.
//
// Weights (packed.py) lie in panels of 16 outputs: 64 bytes hold, for each of 16 outputs, 4 bytes, and each byte the
// codes of 8 / BITS inputs that are 4 apart. A code c stands for c - 128 (8 bits), c - 1 (2), 2 c - 1 (1), so that
// products of codes are mended by the sum of the row: one instruction multiplies unsigned codes with signed inputs.
// The twin is `linear_by_torch` in packed.py. Integer sums are exact, and products and sums of floats are kept apart
// (-ffp-contract=off), so that both give the same bits but for the activation.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;     // outputs of a panel
constexpr int ROW_CHUNK = 96;  // rows that a thread takes at a time: with 64 outputs of weights they stay in the L1 cache
constexpr float TINY = 0x1p-126f;

// --- quantisation ----------------------------------------------------------------------------------------------------

// As Cast(INT8, ROW) of quantise.py. Returns 1 for a row of zeros, 2 for one that is not finite.
int quantise_row(const float* x, long inputs, long padded, int8_t* q, float* scale, int32_t* sum) {
    uint32_t top = 0;  // as bits, so that NaN is larger than infinity and that than all else
    for (long k = 0; k < inputs; ++k) {
        top = std::max(top, __builtin_bit_cast(uint32_t, x[k]) & 0x7fffffffu);
    }
    std::memset(q + inputs, 0, padded - inputs);
    if (top >= 0x7f800000u) {
        std::memset(q, 0, inputs);
        *scale = NAN;
        *sum = 0;
        return 2;
    }
    const float s = std::max(__builtin_bit_cast(float, top) / 127.0f, TINY);
    int32_t total = 0;
    for (long k = 0; k < inputs; ++k) {
        const int32_t value = (int32_t)std::nearbyintf(x[k] / s);
        q[k] = (int8_t)value;
        total += value;
    }
    *scale = s;
    *sum = total;
    return s == TINY;
}

// --- one tile of integer sums ----------------------------------------------------------------------------------------

// sums[row][panel * LANES + output] of codes times inputs, over `steps` lines of 64 bytes a panel.
#if defined(__AVX512VNNI__)

constexpr int ROWS = 6, PANELS = 4;

template <int BITS, int R, int P>
void tile(const uint8_t* w, long panel_bytes, const int8_t* x, long x_stride, long steps, int32_t* sums) {
    __m512i acc[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) acc[r][p] = _mm512_setzero_si512();
    const __m512i mask = _mm512_set1_epi8((char)((1 << BITS) - 1));
    for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 8
        for (int j = 0; j < 8 / BITS; ++j) {
            __m512i codes[P];
            for (int p = 0; p < P; ++p) {
                const __m512i line = _mm512_loadu_si512(w + p * panel_bytes + s * 64);
                codes[p] = BITS == 8 ? line : _mm512_and_si512(_mm512_srli_epi16(line, j * BITS), mask);
            }
            for (int r = 0; r < R; ++r) {
                int32_t four;
                std::memcpy(&four, x + r * x_stride + (s * (8 / BITS) + j) * 4, 4);
                const __m512i inputs = _mm512_set1_epi32(four);
                for (int p = 0; p < P; ++p) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], codes[p], inputs);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) _mm512_storeu_si512(sums + (r * PANELS + p) * LANES, acc[r][p]);
}

template <int BITS>
constexpr int offset() { return BITS == 8 ? 128 : 1; }

#else

constexpr int ROWS = 4, PANELS = 1;

template <int BITS, int R, int P>
void tile(const uint8_t* w, long, const int8_t* x, long x_stride, long steps, int32_t* sums) {
    static_assert(P == 1, "16 registers");
    __m256i acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1), mask = _mm256_set1_epi8((char)((1 << BITS) - 1));
    for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 8
        for (int j = 0; j < 8 / BITS; ++j) {
            __m256i codes[2];
            for (int h = 0; h < 2; ++h) {
                const __m256i line = _mm256_loadu_si256((const __m256i*)(w + s * 64 + h * 32));
                if (BITS == 8)  // back to signed: pairs of unsigned 8-bit products would be cut off at 16 bits
                    codes[h] = _mm256_xor_si256(line, _mm256_set1_epi8((char)0x80));
                else
                    codes[h] = _mm256_and_si256(_mm256_srli_epi16(line, j * BITS), mask);
            }
            for (int r = 0; r < R; ++r) {
                int32_t four;
                std::memcpy(&four, x + r * x_stride + (s * (8 / BITS) + j) * 4, 4);
                const __m256i inputs = _mm256_set1_epi32(four);
                for (int h = 0; h < 2; ++h) {
                    const __m256i pairs = BITS == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes[h]),
                                                                           _mm256_sign_epi8(inputs, codes[h]))
                                                    : _mm256_maddubs_epi16(codes[h], inputs);
                    acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h)
            _mm256_storeu_si256((__m256i*)(sums + r * PANELS * LANES + h * 8), acc[r][h]);
}

template <int BITS>
constexpr int offset() { return BITS == 8 ? 0 : 1; }

#endif

template <int BITS, int P>
void tile_of(int rows, const uint8_t* w, long panel_bytes, const int8_t* x, long x_stride, long steps, int32_t* sums) {
    switch (rows) {
        case 1: return tile<BITS, 1, P>(w, panel_bytes, x, x_stride, steps, sums);
        case 2: return tile<BITS, 2, P>(w, panel_bytes, x, x_stride, steps, sums);
        case 3: return tile<BITS, 3, P>(w, panel_bytes, x, x_stride, steps, sums);
        case 4: return tile<BITS, 4, P>(w, panel_bytes, x, x_stride, steps, sums);
#if defined(__AVX512VNNI__)
        case 5: return tile<BITS, 5, P>(w, panel_bytes, x, x_stride, steps, sums);
        case 6: return tile<BITS, 6, P>(w, panel_bytes, x, x_stride, steps, sums);
#endif
    }
}

// --- what follows the sums -------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__)
constexpr int VECTOR = 16;
#else
constexpr int VECTOR = 8;
#endif
typedef float floats __attribute__((vector_size(4 * VECTOR)));  // the compiler's own, one register
typedef int32_t ints __attribute__((vector_size(4 * VECTOR)));

template <typename Vector>
inline Vector load(const void* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

// Cephes' expf for -87 <= x <= 0.
inline floats exp_of(floats x) {
    x = x < -87.0f ? -87.0f + 0 * x : x;
    const ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);  // rounded: it cuts towards 0
    const floats whole = __builtin_convertvector(n, floats), r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (floats)((n + 127) << 23);
}

// x / 2 (1 + erf(x / sqrt(2))); erf by Abramowitz & Stegun 7.1.26, within 1.5e-7.
inline floats gelu(floats x) {
    const floats z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    floats y = 1.061405429f * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    const floats tail = y * t * exp_of(-z * z) * 0.5f;  // of the normal distribution, beyond |x|
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

struct Job {
    const float* scales;  // of outputs, as many as panels have
    const float* bias;    // likewise, or null
    const float* x_scales;
    const int32_t* x_sums;
    long outputs;  // of a half, if there are two
};

// float32 of sums of one row.
template <int BITS>
inline floats finish(const int32_t* sums, const Job& job, long row, long output) {
    const ints exact = load<ints>(sums) * (BITS == 1 ? 2 : 1) - offset<BITS>() * job.x_sums[row];
    const floats out = __builtin_convertvector(exact, floats) * (job.x_scales[row] * load<floats>(job.scales + output));
    return job.bias ? out + load<floats>(job.bias + output) : out;
}

enum Activation { NONE = 0, GELU = 1, GEGLU = 2 };

template <int BITS>
void product(const Job& job, const uint8_t* w, const int8_t* x, long rows, long padded, int activation, float* out) {
    const long steps = padded / (4 * (8 / BITS)), panel_bytes = steps * 64;
    const long panels = (job.outputs + LANES - 1) / LANES, groups = (panels + PANELS - 1) / PANELS;
    const long chunks = (rows + ROW_CHUNK - 1) / ROW_CHUNK;
#pragma omp for collapse(2) schedule(static)
    for (long chunk = 0; chunk < chunks; ++chunk)
        for (long group = 0; group < groups; ++group) {
            const long first = group * PANELS, last_row = std::min(rows, (chunk + 1) * ROW_CHUNK);
            const int wide = (int)std::min<long>(PANELS, panels - first);
            alignas(64) int32_t sums[2][ROWS * PANELS * LANES];
            for (long row = chunk * ROW_CHUNK; row < last_row; row += ROWS) {
                const int tall = (int)std::min<long>(ROWS, last_row - row);
                for (int half = 0; half < (activation == GEGLU ? 2 : 1); ++half) {
                    const uint8_t* from = w + (half * panels + first) * panel_bytes;
                    if (wide == PANELS)
                        tile_of<BITS, PANELS>(tall, from, panel_bytes, x + row * padded, padded, steps, sums[half]);
                    else
                        for (int p = 0; p < wide; ++p)
                            tile_of<BITS, 1>(tall, from + p * panel_bytes, panel_bytes, x + row * padded, padded, steps,
                                             sums[half] + p * LANES);
                }
                for (int r = 0; r < tall; ++r)
                    for (int p = 0; p < wide; ++p) {
                        const long output = (first + p) * LANES, at = (r * PANELS + p) * LANES;
                        const int lanes = (int)std::min<long>(LANES, job.outputs - output);
                        floats values[LANES / VECTOR];
                        for (int i = 0; i < LANES / VECTOR; ++i) {
                            const long from = i * VECTOR;
                            floats value = finish<BITS>(sums[0] + at + from, job, row + r, output + from);
                            if (activation != NONE) value = gelu(value);
                            if (activation == GEGLU)
                                value *= finish<BITS>(sums[1] + at + from, job, row + r, panels * LANES + output + from);
                            values[i] = value;
                        }
                        std::memcpy(out + (row + r) * job.outputs + output, values, lanes * sizeof(float));
                    }
            }
        }
}

}  // namespace

// out [rows, outputs] of x [rows, inputs]; with GEGLU the weights, scales and bias are of 2 x outputs, and out is
// gelu(first half) * second half. q [rows, padded], x_scales and x_sums [rows] are room to work in. odd: rows of zeros,
// rows that are not finite.
extern "C" void tlm_linear(int bits, const float* x, long rows, long inputs, long padded, const uint8_t* w,
                           const float* scales, const float* bias, long outputs, int activation, float* out, int8_t* q,
                           float* x_scales, int32_t* x_sums, int threads, int64_t* odd) {
    const Job job{scales, bias, x_scales, x_sums, outputs};
    int64_t zeros = 0, broken = 0;
    const unsigned mode = _mm_getcsr();  // whether denormals are flushed, which each thread has for itself
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _mm_setcsr(mode);
#pragma omp for schedule(static) reduction(+ : zeros, broken)
        for (long row = 0; row < rows; ++row) {
            const int kind =
                quantise_row(x + row * inputs, inputs, padded, q + row * padded, x_scales + row, x_sums + row);
            zeros += kind == 1;
            broken += kind == 2;
        }
        if (bits == 8)
            product<8>(job, w, q, rows, padded, activation, out);
        else if (bits == 2)
            product<2>(job, w, q, rows, padded, activation, out);
        else
            product<1>(job, w, q, rows, padded, activation, out);
    }
    odd[0] = zeros;
    odd[1] = broken;
}
