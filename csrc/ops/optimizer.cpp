// SPDX-License-Identifier: Apache-2.0
// The optimizer steps: their checks, which are those of every device, and the CPU's side.
#include "ops/optimizer.h"

#include <atomic>
#include <cmath>

#include "formats/layout.h"
#include "ops/cpu_common.h"

namespace mxtrain {

// ---- checks ----

static void check_device_of(const AdamwCall& c, const char* name, size_t i, const Tensor& t) {
  const Tensor& first = c.params[0];
  MXT_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), c.op,
            name, "[", i, "] must be on the device of params[0], got ", device_of(t),
            " (params[0] is on ", device_of(first), "). Call once for each device.");
}

static void check_length(const AdamwCall& c, const char* name, size_t length) {
  MXT_CHECK(length == c.params.size(), c.op, name, " must have one entry for each parameter, got ",
            length, " (", c.params.size(), " parameters). Pass lists of one length.");
}

// One tensor for each parameter, with its elements and of this dtype.
static void check_list(const AdamwCall& c, const char* name, const TensorList& list,
                       ScalarType dtype) {
  check_length(c, name, list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor &t = list[i], &param = c.params[i];
    MXT_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == param.numel(), c.op,
              name, "[", i, "] must be contiguous ", dtype_name(dtype), " with ", param.numel(),
              " elements, got ", dtype_name(t.scalar_type()), " ", shape_of(t),
              t.is_contiguous() ? "" : " strided", " (params[", i, "] has shape ", shape_of(param),
              "). Make it like its parameter.");
    check_device_of(c, name, i, t);
  }
}

static void check_params(const AdamwCall& c) {
  for (size_t i = 0; i < c.params.size(); ++i) {
    const Tensor& t = c.params[i];
    const ScalarType dtype = t.scalar_type();
    MXT_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, c.op, "params[", i,
              "] must be float32 or bfloat16, got ", dtype_name(dtype), " (shape ", shape_of(t),
              "). Convert it first.");
    MXT_CHECK(dtype == c.params[0].scalar_type(), c.op, "params[", i,
              "] must have the dtype of params[0], got ", dtype_name(dtype), " (params[0] is ",
              dtype_name(c.params[0].scalar_type()), "). Call once for each dtype.");
    MXT_CHECK(t.is_contiguous(), c.op, "params[", i, "] must be contiguous, got strides (shape ",
              shape_of(t), "). Pass a view in the order of memory.");
    check_device_of(c, "params", i, t);
  }
}

static void check_options(const AdamwCall& c) {
  const auto in_range = [&](const char* name, double v, double below) {
    MXT_CHECK(v >= 0.0 && v < below, c.op, name, " must lie in [0, ", below, "), got ", v, " (",
              c.params.size(), " parameters). Correct it.");
  };
  in_range("beta1", c.options.beta1, 1.0);
  in_range("beta2", c.options.beta2, 1.0);
  in_range("eps", c.options.eps, INFINITY);
  if (c.lr_tensor) {
    const Tensor& t = *c.lr_tensor;
    MXT_CHECK(t.scalar_type() == ScalarType::Double && t.numel() == 1, c.op,
              "lr_tensor must be one float64, got ", dtype_name(t.scalar_type()), " (shape ",
              shape_of(t), "). Convert it first.");
    check_same_device(c.op, "lr_tensor", t, c.params[0]);
  }
  if (c.rng) {
    const Tensor& t = *c.rng;
    const bool shaped = t.dim() == 2 && t.size(1) == 2 &&
                        t.size(0) == static_cast<int64_t>(c.params.size()) && t.is_contiguous();
    MXT_CHECK(t.scalar_type() == ScalarType::Long && shaped, c.op,
              "rng must be contiguous int64 of shape [", c.params.size(), ", 2], got ",
              dtype_name(t.scalar_type()), " ", shape_of(t), " (a row for each parameter). ",
              "See mxtrain.draw_rng.");
    check_same_device(c.op, "rng", t, c.params[0]);
  }
}

static void check_steps(const AdamwCall& c) {
  check_length(c, "steps", c.steps.size());
  for (size_t i = 0; i < c.steps.size(); ++i) {
    const Tensor& t = c.steps[i];
    MXT_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == 1, c.op, "steps[", i,
              "] must be one float32, got ", dtype_name(t.scalar_type()), " (shape ", shape_of(t),
              "). It counts the steps of params[", i, "].");
    check_device_of(c, "steps", i, t);
  }
}

static void check_statistics(const AdamwCall& c) {
  check_list(c, "weight_changes", c.weight_changes, ScalarType::Float);
  check_list(c, "quantized_changes", c.quantized_changes, ScalarType::Float);
  for (size_t i = 0; i < c.params.size(); ++i)
    MXT_CHECK(c.params[i].dim() == 2, c.op, "params[", i,
              "] must have 2 dimensions where changes are summed, got ", c.params[i].dim(),
              " (shape ", shape_of(c.params[i]), "). Only weights of linear layers are quantized.");
  check_choice(c.op, "scale_rule", c.scale_rule, kScaleRuleNames, kScaleRules);
  check_choice(c.op, "rounding", c.rounding, kRoundingNames, kRoundings);
  MXT_CHECK(c.rounding != static_cast<int64_t>(Rounding::kStochastic), c.op,
            "rounding must be nearest or toward, got stochastic (", c.params.size(),
            " parameters). Random flips say nothing of the weights.");
  MXT_CHECK(c.rounding != static_cast<int64_t>(Rounding::kToward) || !c.emas.empty(), c.op,
            "emas must be given with rounding toward, got none (", c.params.size(),
            " parameters). Give them, or round to nearest.");
}

static void check_ramp(const AdamwCall& c) {
  check_list(c, "grad_sums", c.grad_sums, ScalarType::Float);
  const bool wide = !c.counts.empty() && c.counts[0].scalar_type() == ScalarType::Short;
  check_list(c, "counts", c.counts, wide ? ScalarType::Short : ScalarType::Byte);
  check_list(c, "periods", c.periods, wide ? ScalarType::Short : ScalarType::Byte);
}

void check_adamw(const AdamwCall& c) {
  check_params(c);
  check_list(c, "grads", c.grads, c.params[0].scalar_type());
  check_list(c, "exp_avgs", c.exp_avgs, ScalarType::Float);
  check_list(c, "exp_avg_sqs", c.exp_avg_sqs, ScalarType::Float);
  check_steps(c);
  check_options(c);
  if (!c.emas.empty()) check_list(c, "emas", c.emas, ScalarType::Float);
  MXT_CHECK(c.ema_weights.size() == c.emas.size(), c.op,
            "ema_weights must have one entry for each of emas, got ", c.ema_weights.size(), " (",
            c.emas.size(), " emas). Pass lists of one length.");
  for (size_t i = 0; i < c.ema_weights.size(); ++i)
    MXT_CHECK(c.ema_weights[i] >= 0.0 && c.ema_weights[i] <= 1.0, c.op, "ema_weights[", i,
              "] must lie in [0, 1], got ", c.ema_weights[i], " (", c.params.size(),
              " parameters). It is 1 - ema_beta, or 1 to copy.");
  if (!c.weight_changes.empty() || !c.quantized_changes.empty()) check_statistics(c);
  if (c.ramped) check_ramp(c);
}

// ---- as the kernels see it ----

template <class T>
static T* entry(const TensorList& list, size_t i) {
  return list.empty() ? nullptr : static_cast<T*>(list[i].mutable_data_ptr());
}

static bool all_aligned(const AdamwTensor& t) {
  const void* pointers[] = {t.param, t.grad,          t.exp_avg,          t.exp_avg_sq,
                            t.ema,   t.weight_change, t.quantized_change, t.grad_sum,
                            t.count, t.period};
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return t.cols == t.n || t.cols % 8 == 0;
}

std::vector<AdamwTensor> adamw_tensors(const AdamwCall& c) {
  std::vector<AdamwTensor> tensors(c.params.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    AdamwTensor& t = tensors[i];
    const Tensor& param = c.params[i];
    t.param = param.mutable_data_ptr();
    t.grad = c.grads[i].const_data_ptr();
    t.exp_avg = entry<float>(c.exp_avgs, i);
    t.exp_avg_sq = entry<float>(c.exp_avg_sqs, i);
    t.ema = entry<float>(c.emas, i);
    t.weight_change = entry<float>(c.weight_changes, i);
    t.quantized_change = entry<float>(c.quantized_changes, i);
    t.grad_sum = entry<float>(c.grad_sums, i);
    t.count = entry<void>(c.counts, i);
    t.period = entry<void>(c.periods, i);
    t.step = entry<float>(c.steps, i);
    t.n = param.numel();
    t.cols = t.weight_change && t.n ? param.size(1) : t.n;
    t.ema_weight = c.ema_weights.empty() ? 0.0f : static_cast<float>(c.ema_weights[i]);
    t.bf16 = param.scalar_type() == ScalarType::BFloat16;
    t.wide = c.ramped && c.counts[i].scalar_type() == ScalarType::Short;
    t.statistics = !c.weight_changes.empty();
    t.ramped = c.ramped;
    t.vector = all_aligned(t);
  }
  return tensors;
}

WeightQuantizer weight_quantizer(const AdamwCall& c) {
  return {e8m0_round_up<Mxfp4::Element>(static_cast<ScaleRule>(c.scale_rule)),
          c.rounding == static_cast<int64_t>(Rounding::kToward)};
}

// ---- the CPU ----

namespace cpu {

static bool all_finite(const AdamwTensor& t) {
  std::atomic<bool> finite = true;
  torch::stable::parallel_for(0, t.n, kGrainElements, [&](int64_t begin, int64_t end) {
    uint32_t bits = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t b = t.bf16
                             ? static_cast<uint32_t>(static_cast<const uint16_t*>(t.grad)[i]) << 16
                             : float_bits(static_cast<const float*>(t.grad)[i]);
      bits = (b & ~kSignBit) > bits ? (b & ~kSignBit) : bits;
    }
    if (bits >= kInfBits) finite = false;
  });
  return finite;
}

static void run(const AdamwCall& call) {
  check_adamw(call);
  const std::vector<AdamwTensor> tensors = adamw_tensors(call);
  AdamwOptions options = call.options;
  if (call.lr_tensor) options.lr = *static_cast<const double*>(call.lr_tensor->const_data_ptr());
  const int64_t* rng = call.rng ? call.rng->const_data_ptr<int64_t>() : nullptr;
  AdamwParams p = {};
  p.quantizer = weight_quantizer(call);
  for (size_t i = 0; i < tensors.size(); ++i) {
    p.t = tensors[i];
    p.factors = adamw_factors(options, *p.t.step += 1.0f);
    p.finite = !p.t.ramped || all_finite(p.t);
    p.stochastic = p.t.bf16 && rng;
    if (p.stochastic)
      p.key = {static_cast<uint64_t>(rng[2 * i]), static_cast<uint32_t>(rng[2 * i + 1]),
               kRowStream};
    if (p.t.n == 0) continue;
    const int64_t blocks = p.t.n / p.t.cols * tiles(p.t.cols, Mxfp4::kBlock);
    torch::stable::parallel_for(0, blocks, grain(Mxfp4::kBlock), [&](int64_t begin, int64_t end) {
      kernels().adamw(p, begin, end);
    });
  }
}

MXT_DEFINE_ADAMW_OPS(run)

}  // namespace cpu
}  // namespace mxtrain
