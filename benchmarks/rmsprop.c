/* The rival that a C programmer would write: RMSProp over one flat array, all cores.
 *
 *     v = alpha v + (1 - alpha) g g
 *     p = p - lr g / (sqrt(v) + eps)
 *
 * 20 bytes an element: p, g and v are read, p and v are written. Below `parallel_from` elements, waking threads costs
 * more than it saves.
 */
#include <math.h>
#include <stdint.h>

enum { parallel_from = 32768 };

void rmsprop_step(float *restrict param, const float *restrict grad, float *restrict square_avg, int64_t size,
                  float lr, float alpha, float one_minus_alpha, float eps)
{
#pragma omp parallel for simd schedule(static) if (parallel : size >= parallel_from)
    for (int64_t i = 0; i < size; i++) {
        float g = grad[i];
        float v = alpha * square_avg[i] + one_minus_alpha * g * g;
        square_avg[i] = v;
        param[i] -= lr * g / (sqrtf(v) + eps);
    }
}

/* The memory's limit: the same streams, with an addition in place of the rule, so that nothing is optimised away.
 * `written` are the arrays that are read and written: param, square_avg, and one or two buffers more.
 */
#define COPY(more)                                                                               \
    _Pragma("omp parallel for simd schedule(static) if (parallel : size >= parallel_from)")      \
    for (int64_t i = 0; i < size; i++) {                                                         \
        float g = grad[i];                                                                       \
        a[i] += g;                                                                               \
        b[i] += g;                                                                               \
        more                                                                                     \
    }

void copy_step(float *const *written, int count, const float *restrict grad, int64_t size)
{
    float *restrict a = written[0], *restrict b = written[1];
    if (count == 2) {
        COPY()
    } else if (count == 3) {
        float *restrict c = written[2];
        COPY(c[i] += g;)
    } else {
        float *restrict c = written[2], *restrict d = written[3];
        COPY(c[i] += g; d[i] += g;)
    }
}
