#pragma once
#include "core/backend.h"
#include "ops/kernel_device.h"
#include "ops/scalar_math.h"

// Kernels of the elementwise ops, by functor of scalar_math.inc. All views have the output's shape (stride 0 repeats);
// the output may be one of the operands, element for element, and has no strides of 0. f64 is computed in f64, the rest
// in f32 and rounded once.

namespace weft {

/// What a kernel reads: an array, or one number for all elements.
struct Operand {
  Operand(const StridedView& array) : view(array) {}         // NOLINT: implicit on purpose
  Operand(double value) : is_number(true), number(value) {}  // NOLINT
  StridedView view;
  bool is_number = false;
  double number = 0;
};

/// y = Op::value(x).
template <class Op>
void unary(Cpu, const StridedView& y, const Operand& x);
template <class Op>
void unary(Cuda, const StridedView& y, const Operand& x);

/// dx = dy * Op::derivative(saved).
template <class Op>
void unary_backward(Cpu, const StridedView& dx, const Operand& dy, const Operand& saved);
template <class Op>
void unary_backward(Cuda, const StridedView& dx, const Operand& dy, const Operand& saved);

/// y = Op::value(a, b).
template <class Op>
void binary(Cpu, const StridedView& y, const Operand& a, const Operand& b);
template <class Op>
void binary(Cuda, const StridedView& y, const Operand& a, const Operand& b);

/// y = a + alpha * b, the product unrounded where the instruction set has fused multiply-add.
void add_scaled(Cpu, const StridedView& y, const Operand& a, const Operand& b, double alpha);
void add_scaled(Cuda, const StridedView& y, const Operand& a, const Operand& b, double alpha);

enum class Comparison : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe };

/// y = a (comparison) b; y is bool, a and b are of one dtype or numbers.
void compare(Cpu, Comparison comparison, const StridedView& y, const Operand& a, const Operand& b);
void compare(Cuda, Comparison comparison, const StridedView& y, const Operand& a, const Operand& b);

/// y = condition ? a : b; condition is bool, a and b are of y's dtype or numbers.
void select(Cpu, const StridedView& y, const StridedView& condition, const Operand& a, const Operand& b);
void select(Cuda, const StridedView& y, const StridedView& condition, const Operand& a, const Operand& b);

}  // namespace weft
