// SPDX-License-Identifier: Apache-2.0
// The function table of one instruction set; compiled once for each, after quantize.cpp,
// convert.cpp, optimizer.cpp, statistics.cpp, int8.cpp and context.cpp.
#include "cpu/kernels.h"

#define MXT_STRING_(x) #x
#define MXT_STRING(x) MXT_STRING_(x)

namespace mxtrain::cpu::MXT_ISA {

void quantize(const QuantizeParams&, int64_t, int64_t);
uint32_t finite_amax(const QuantizeParams&, int64_t, int64_t);
void dequantize(const DequantizeParams&, int64_t, int64_t);
void hadamard(const HadamardParams&, int64_t, int64_t);
void stochastic_round(const StochasticRoundParams&, int64_t, int64_t);
void epilogue(const EpilogueParams&, int64_t, int64_t);
void column_strips(const ColumnSumParams&, int64_t, int64_t);
void statistics(const StatisticsParams&, int64_t);
void adamw(const AdamwParams&, int64_t, int64_t);
Int8BlockState int8_quantize(const Int8QuantizeParams&, int64_t, int64_t);
void int8_gemm(const Int8GemmParams&, int64_t, int64_t);
void rms_norm_forward(const RmsNormParams&, int64_t, int64_t);
void rms_norm_backward(const RmsNormParams&, int64_t, int64_t);
void swiglu_forward(const SwigluParams&, int64_t, int64_t);
void swiglu_backward(const SwigluParams&, int64_t, int64_t);

extern const Kernels kTable;
const Kernels kTable = {MXT_STRING(MXT_ISA),
                        quantize,
                        finite_amax,
                        dequantize,
                        hadamard,
                        stochastic_round,
                        epilogue,
                        column_strips,
                        adamw,
                        statistics,
                        int8_quantize,
                        int8_gemm,
                        rms_norm_forward,
                        rms_norm_backward,
                        swiglu_forward,
                        swiglu_backward};

}  // namespace mxtrain::cpu::MXT_ISA
