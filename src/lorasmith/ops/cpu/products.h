/* Products of bf16 matrices: by tiles where the processor has them (Intel AMX), else by vectors. Each of

   product_32: out [32, 32] = a [32, dp] times b, columns as in as_columns, of width d
   add_rows: out [rows, dc] += a times b: a in blocks [steps][rows][32], b in [steps][dc/16][16][16][2]
   add_columns: out [rows, 32] += a times b: a as before, b in [2][steps][16][16][2], whose halves are so far apart

   is between begin_products and end_products. */
#ifndef PRODUCTS_H
#define PRODUCTS_H
#include "operands.h"

#ifdef __AMX_BF16__
typedef struct { uint8_t palette, start; uint8_t zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } TileConfig;

static inline void begin_products(void) {
    TileConfig c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) { c.bytes[i] = 64; c.rows[i] = 16; }
    _tile_loadconfig(&c);
}

static inline void end_products(void) { _tile_release(); }

static inline void product_32(const bf16 *a, const bf16 *b, int64_t d, float *out) {
    const int64_t dp = up_to(d, STEP);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t s = 0; s < dp / STEP; s++) {
        _tile_loadd(4, a + s * STEP, dp * 2);
        _tile_loadd(5, a + TILE * dp + s * STEP, dp * 2);
        _tile_loadd(6, b + s * TILE * TILE * 2, 64);
        _tile_loadd(7, b + (dp / 2 + s * TILE) * TILE * 2, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 128); _tile_stored(1, out + 16, 128);
    _tile_stored(2, out + 16 * 32, 128); _tile_stored(3, out + 16 * 32 + 16, 128);
}

static inline void add_rows(float *out, const bf16 *a, const bf16 *b, int64_t rows, int64_t dc, int64_t steps) {
    for (int64_t r = 0; r < rows; r += STEP)
        for (int64_t c = 0; c < dc; c += STEP) {
            float *top = out + r * dc + c, *bottom = top + TILE * dc;
            const int is_pair = c + TILE < dc;
            _tile_loadd(0, top, dc * 4); _tile_loadd(2, bottom, dc * 4);
            if (is_pair) { _tile_loadd(1, top + TILE, dc * 4); _tile_loadd(3, bottom + TILE, dc * 4); }
            for (int64_t s = 0; s < steps; s++) {
                const bf16 *left = a + (s * rows + r) * STEP, *right = b + (s * dc + c) * STEP;
                _tile_loadd(4, left, 64); _tile_loadd(5, left + TILE * STEP, 64); _tile_loadd(6, right, 64);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
                if (!is_pair) continue;
                _tile_loadd(7, right + TILE * STEP, 64);
                _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, top, dc * 4); _tile_stored(2, bottom, dc * 4);
            if (is_pair) { _tile_stored(1, top + TILE, dc * 4); _tile_stored(3, bottom + TILE, dc * 4); }
        }
}

static inline void add_columns(float *out, const bf16 *a, const bf16 *b, int64_t half, int64_t rows, int64_t steps) {
    for (int64_t r = 0; r < rows; r += TILE, out += TILE * STEP) {
        _tile_loadd(0, out, 128); _tile_loadd(1, out + TILE, 128);
        for (int64_t s = 0; s < steps; s++) {
            _tile_loadd(4, a + (s * rows + r) * STEP, 64);
            _tile_loadd(6, b + s * STEP * TILE, 64); _tile_loadd(7, b + half + s * STEP * TILE, 64);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, out, 128); _tile_stored(1, out + TILE, 128);
    }
}

#else
static inline void begin_products(void) {}
static inline void end_products(void) {}

enum { ROWS = 8, MOST_COLUMNS = 3 };

/* Where step s of a row, or of 16 columns, begins: s steps and so many rows, or columns, behind. */
typedef struct { const bf16 *at; int64_t next, step; } Operand;

static inline __m512bh pair_of(const bf16 *x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

/* out [ROWS, 16 columns] += a times b, of so many steps of so many pairs of numbers; is_new: = instead */
static inline __attribute__((always_inline)) void add_8(float *out, int64_t row, const int columns, Operand a, Operand b,
                                                        int64_t steps, int64_t pairs, const int is_new) {
    __m512 sums[ROWS][MOST_COLUMNS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < columns; j++)
            sums[i][j] = is_new ? _mm512_setzero_ps() : _mm512_load_ps(out + i * row + j * TILE);
    for (int64_t s = 0; s < steps; s++, a.at += a.step, b.at += b.step)
        for (int64_t p = 0; p < pairs; p++) {
            __m512bh right[MOST_COLUMNS];
            for (int j = 0; j < columns; j++) right[j] = (__m512bh)_mm512_load_si512(b.at + j * b.next + p * STEP);
            for (int i = 0; i < ROWS; i++) {
                __m512bh left = pair_of(a.at + i * a.next + 2 * p);
                for (int j = 0; j < columns; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
            }
        }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < columns; j++) _mm512_store_ps(out + i * row + j * TILE, sums[i][j]);
}

static inline void product_32(const bf16 *a, const bf16 *b, int64_t d, float *out) {
    const int64_t dp = up_to(d, STEP);
    for (int64_t r = 0; r < STEP; r += ROWS)
        add_8(out + r * STEP, STEP, 2, (Operand){a + r * dp, dp, 0}, (Operand){b, dp * TILE, 0}, 1, (d + 1) / 2, 1);
}

static inline void add_rows(float *out, const bf16 *a, const bf16 *b, int64_t rows, int64_t dc, int64_t steps) {
    for (int64_t c = 0, columns; c < dc; c += columns * TILE) {
        int64_t left = (dc - c) / TILE;
        columns = left == 2 || left == 4 ? 2 : least(left, MOST_COLUMNS);
        for (int64_t r = 0; r < rows; r += ROWS) {
            float *to = out + r * dc + c;
            const Operand x = {a + r * STEP, STEP, rows * STEP}, y = {b + c * STEP, STEP * TILE, dc * STEP};
            if (columns == 3) add_8(to, dc, 3, x, y, steps, TILE, 0);
            else if (columns == 2) add_8(to, dc, 2, x, y, steps, TILE, 0);
            else add_8(to, dc, 1, x, y, steps, TILE, 0);
        }
    }
}

static inline void add_columns(float *out, const bf16 *a, const bf16 *b, int64_t half, int64_t rows, int64_t steps) {
    for (int64_t r = 0; r < rows; r += ROWS)
        add_8(out + r * STEP, STEP, 2, (Operand){a + r * STEP, STEP, rows * STEP}, (Operand){b, half, STEP * TILE}, steps,
              TILE, 0);
}
#endif
#endif
