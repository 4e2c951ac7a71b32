// The optimizer step of one weight, in fp32. Include after criterion.inl, in the same namespace.
//
// The arithmetic is that of torch's vectorised fused AdamW and of its SGD on a CPU with FMA, operation by operation:
// lerp, addcmul and add(alpha) are fused multiply-adds there, addcdiv and the rest are not. Explicit fma survives
// -ffp-contract=off and --fmad=false, so the CPU and CUDA kernels agree with each other and, in fp32, with torch to the
// last bit. (torch's unfused AdamW takes its square root from MKL, which does not round it correctly.)

// One row of the `hyper` table per tensor: every factor computed in double on the host and rounded once.
// The columns are those that pins_ext/optim/adamw.py and sgd.py write.
struct AdamWRow {
  float lr;           // of the coming step; the criterion's lr
  float decay;        // 1 - lr weight_decay
  float lerp_weight;  // 1 - beta1
  float beta2;
  float one_minus_beta2;
  float minus_step_size;  // -lr / (1 - beta1^step)
  float bias_sqrt;        // sqrt(1 - beta2^step)
  float eps;
};

struct SgdRow {
  float lr;
  float weight_decay;
  float momentum;
  float one_minus_dampening;
  float first;     // 1: the momentum buffer starts as the gradient
  float nesterov;  // 1 or 0
  float minus_lr;
  float unused;
};

PINS_HD float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// torch.lerp: from the nearer end, so that both ends are exact.
PINS_HD float lerp(float start, float end, float weight) {
  const bool near_start = weight < 0.5f;
  return fused_multiply_add(near_start ? weight : weight - 1.0f, end - start, near_start ? start : end);
}

// sqrt(v) / sqrt(1 - beta2^step).
PINS_HD float unbiased(float root, const AdamWRow& row) { return root / row.bias_sqrt; }

// Loshchilov & Hutter 2019 (decoupled weight decay), as torch.optim.AdamW computes it.
template <class Row>
PINS_HD float adamw(float p, float g, float& exp_avg, float& exp_avg_sq, const Row& row) {
  p = p * row.decay;
  exp_avg = lerp(exp_avg, g, row.lerp_weight);
  exp_avg_sq = fused_multiply_add(row.one_minus_beta2 * g, g, exp_avg_sq * row.beta2);
#ifdef __CUDA_ARCH__
  float root = __fsqrt_rn(exp_avg_sq);
#else
  float root = __builtin_sqrtf(exp_avg_sq);
#endif
  float denominator = unbiased(root, row) + row.eps;
  return p + ((row.minus_step_size * exp_avg) / denominator);
}

// torch.optim.SGD: weight decay, momentum with dampening, Nesterov. Choices instead of branches: loops are vectorised.
PINS_HD float sgd(float p, float g, float& momentum_buffer, const SgdRow& row) {
  const float decayed = row.weight_decay != 0.0f ? fused_multiply_add(row.weight_decay, p, g) : g;
  const float averaged = fused_multiply_add(row.one_minus_dampening, decayed, momentum_buffer * row.momentum);
  const float buffer = row.first != 0.0f ? decayed : averaged;
  const float step = row.nesterov != 0.0f ? fused_multiply_add(row.momentum, buffer, decayed) : buffer;
  momentum_buffer = row.momentum != 0.0f ? buffer : momentum_buffer;
  return fused_multiply_add(row.minus_lr, row.momentum != 0.0f ? step : decayed, p);
}
