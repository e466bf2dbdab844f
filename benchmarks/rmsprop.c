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
