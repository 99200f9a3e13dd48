// SPDX-License-Identifier: Apache-2.0
// The order in which column_sum adds the rows of a matrix, on every device.
#pragma once

namespace mxtrain {

constexpr int kSumRows = 32;                        // one after the other, from zero
constexpr int kSumRuns = 8;                         // sums of kSumRows rows, likewise
constexpr int kSumStripRows = kSumRows * kSumRuns;  // then those of strips, likewise

}  // namespace mxtrain
