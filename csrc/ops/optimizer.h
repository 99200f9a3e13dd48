// SPDX-License-Identifier: Apache-2.0
// What the optimizer steps of both devices share: their arguments, checked, as the kernels'
// structs.
#pragma once

#include "ops/ops.h"
#include "optim/adamw.h"

namespace mxtrain {

// The arguments of adamw_ and ramped_adamw_; what a call does not have stays empty.
struct AdamwCall {
  const char* op;
  TensorList params, grads, exp_avgs, exp_avg_sqs, steps;
  AdamwOptions options;
  OptionalTensor lr_tensor, rng;
  TensorList emas = {};
  std::vector<double> ema_weights = {};
  TensorList weight_changes = {}, quantized_changes = {};
  int64_t scale_rule = 1, rounding = 0;
  TensorList grad_sums = {}, counts = {}, periods = {};
  bool ramped = false;
};

void check_adamw(const AdamwCall& call);
std::vector<AdamwTensor> adamw_tensors(const AdamwCall& call);
WeightQuantizer weight_quantizer(const AdamwCall& call);

// The two ops of a device, given the function that runs a call.
#define MXT_DEFINE_ADAMW_OPS(run)                                                                 \
  void adamw_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,   \
              TensorList steps, double lr, double beta1, double beta2, double eps,                \
              double weight_decay, OptionalTensor lr_tensor, OptionalTensor rng, TensorList emas, \
              std::vector<double> ema_weights, TensorList weight_changes,                         \
              TensorList quantized_changes, int64_t scale_rule, int64_t rounding) {               \
    run({"adamw_",                                                                                \
         params,                                                                                  \
         grads,                                                                                   \
         exp_avgs,                                                                                \
         exp_avg_sqs,                                                                             \
         steps,                                                                                   \
         {lr, beta1, beta2, eps, weight_decay},                                                   \
         lr_tensor,                                                                               \
         rng,                                                                                     \
         emas,                                                                                    \
         ema_weights,                                                                             \
         weight_changes,                                                                          \
         quantized_changes,                                                                       \
         scale_rule,                                                                              \
         rounding});                                                                              \
  }                                                                                               \
  void ramped_adamw_(TensorList params, TensorList grads, TensorList exp_avgs,                    \
                     TensorList exp_avg_sqs, TensorList steps, double lr, double beta1,           \
                     double beta2, double eps, double weight_decay, OptionalTensor lr_tensor,     \
                     OptionalTensor rng, TensorList grad_sums, TensorList counts,                 \
                     TensorList periods) {                                                        \
    AdamwCall call = {"ramped_adamw_",                                                            \
                      params,                                                                     \
                      grads,                                                                      \
                      exp_avgs,                                                                   \
                      exp_avg_sqs,                                                                \
                      steps,                                                                      \
                      {lr, beta1, beta2, eps, weight_decay},                                      \
                      lr_tensor,                                                                  \
                      rng};                                                                       \
    call.grad_sums = grad_sums;                                                                   \
    call.counts = counts;                                                                         \
    call.periods = periods;                                                                       \
    call.ramped = true;                                                                           \
    run(call);                                                                                    \
  }

}  // namespace mxtrain
