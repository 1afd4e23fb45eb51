/* The layouts that the operands of products of bf16 matrices have. */
#ifndef OPERANDS_H
#define OPERANDS_H
#include <string.h>
#include "vectors.h"

enum { TILE = 16, STEP = 32 };

static inline void *cut(char **at, int64_t bytes) { void *p = *at; *at += up_to(bytes, 64); return p; }

/* [B, H, rows, d] and [n, d], of which the last axis lies close */
typedef struct { bf16 *data; int64_t batch, head, row; } View;
typedef struct { bf16 *data; int64_t row, n, d; } Rows;
static inline Rows rows_of(View x, int64_t b, int64_t h, int64_t n, int64_t d) {
    return (Rows){x.data + b * x.batch + h * x.head, x.row, n, d};
}
static inline Rows from(Rows x, int64_t i) { return (Rows){x.data + i * x.row, x.row, x.n - i, x.d}; }
/* 32 numbers of row i from column c on, zeros beyond */
static inline __m512i part(Rows x, int64_t i, int64_t c) {
    if (i >= x.n) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi16(first_32(x.d - c), x.data + i * x.row + c);
}
/* r [16][16] of 32 bits, transposed */
static inline void transpose(__m512i r[TILE]) {
    __m512i t[TILE];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
            t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    }
}

/* -> [np, dp], zeros around: a left-hand operand */
static inline void as_left(Rows x, int64_t np, int64_t dp, bf16 *out) {
    for (int64_t i = 0; i < np; i++)
        for (int64_t c = 0; c < dp; c += STEP) _mm512_store_si512(out + i * dp + c, part(x, i, c));
}
/* -> [np/16][dp/2][16][2]: a right-hand operand whose columns are the rows of x */
static inline void as_columns(Rows x, int64_t np, int64_t dp, bf16 *out) {
    for (int64_t i = 0; i < np; i += TILE)
        for (int64_t c = 0; c < dp; c += STEP) {
            __m512i r[TILE];
            for (int j = 0; j < TILE; j++) r[j] = part(x, i + j, c);
            transpose(r);
            for (int j = 0; j < TILE; j++) _mm512_store_si512(out + i * dp + (c + 2 * j) * TILE, r[j]);
        }
}
/* 32 rows from row i on and 16 columns from column c on -> [16][16][2] */
static inline void row_pairs(Rows x, int64_t i, int64_t c, __m512i out[TILE]) {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    for (int64_t p = 0; p < TILE; p++)
        out[p] = _mm512_permutex2var_epi16(part(x, i + 2 * p, c), order, part(x, i + 2 * p + 1, c));
}
/* -> [np/32][dc/16][16][16][2]: a right-hand operand whose rows are the rows of x */
static inline void as_rows(Rows x, int64_t np, int64_t dc, bf16 *out) {
    for (int64_t i = 0; i < np; i += STEP)
        for (int64_t c = 0; c < dc; c += TILE, out += STEP * TILE) {
            __m512i r[TILE];
            row_pairs(x, i, c, r);
            for (int p = 0; p < TILE; p++) _mm512_store_si512(out + p * STEP, r[p]);
        }
}
/* -> [np/32][dc][32]: a left-hand operand, transposed */
static inline void as_left_transposed(Rows x, int64_t np, int64_t dc, bf16 *out) {
    for (int64_t i = 0; i < np; i += STEP)
        for (int64_t c = 0; c < dc; c += TILE, out += STEP * TILE) {
            __m512i r[TILE];
            row_pairs(x, i, c, r);
            transpose(r);
            for (int p = 0; p < TILE; p++) _mm512_store_si512(out + p * STEP, r[p]);
        }
}
/* row [d] times the factor; the row's memory reaches to a whole TILE */
static inline void put_row(const float *row, float factor, int64_t d, bf16 *out) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t c = 0; c < d; c += TILE) put(_mm512_mul_ps(_mm512_load_ps(row + c), by), d - c, out + c);
}
#endif
