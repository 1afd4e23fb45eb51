/* Numbers in bf16, 16 or 32 at a time. */
#ifndef VECTORS_H
#define VECTORS_H
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

typedef uint16_t bf16;
static const float LOG2_E = 1.44269504f;

static inline int64_t up_to(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* the first n of 32 or of 16 lanes */
static inline __mmask32 first_32(int64_t n) { return n >= 32 ? ~(__mmask32)0 : n <= 0 ? 0 : ((__mmask32)1 << n) - 1; }
static inline __mmask16 first_16(int64_t n) { return (__mmask16)first_32(n < 16 ? n : 16); }

/* the first n of 16 numbers; zeros stand for the others */
static inline __m512 get(const bf16 *x, int64_t n) {
    __m256i bits = _mm256_maskz_loadu_epi16(first_16(n), x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline void put(__m512 x, int64_t n, bf16 *out) {
    _mm256_mask_storeu_epi16(out, first_16(n), (__m256i)_mm512_cvtneps_pbh(x));
}

/* those at even places, and those at odd ones */
static inline __m512 even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
static inline __m512 odd(__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }
static inline __m512i narrowed(__m512 hi, __m512 lo) { return (__m512i)_mm512_cvtne2ps_pbh(hi, lo); }

/* 2^x, to 2.6e-6 of it: a polynomial of degree 4 for the part of x behind the point */
static inline __m512 exp2_of(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.013534168f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0520114623f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241442754f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693003835f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(p, x);
}
#endif
