#include "apps/step_prediction.h"

#include "apps/files.h"
#include "apps/step_shapes.h"
#include "core/error.h"
#include "models/speed_of_light.h"

namespace weft::apps {
namespace {

// What others' kernels reached on an H200: a product of 8,192^3 random numbers in bf16, and a copy, read plus written.
constexpr double kProducts = 788e12, kCopy = 4.3e12;
constexpr int64_t kTokens = 524288;  // of a step

struct Goal {
  const char* shape;
  int64_t tokens;  ///< per second
};
constexpr Goal kGoals[] = {{"124m", 624000}, {"350m", 227000}, {"1558m", 56000}};

/// Elements that one token moves in one layer, in units of C: what is queued beside products and attention.
struct Pass {
  const char* name;
  double elements;
  const char* what;
};
constexpr Pass kPasses[] = {
    {"residual + layer norm, forward, twice", 8, "reads x and branch, writes their sum and its norm"},
    {"GELU, forward", 8, "reads 4 C, writes 4 C"},
    {"residual + layer norm, backward, twice", 8, "reads dy, the sum and its gradient, writes dx"},
    {"GELU, backward", 4, "reads its input of 4 C in the epilogue of the product before it"},
    {"bias gradients", 0, "in the epilogues of the products that give the weights' gradients"},
};
/// What unfused forms would move on top.
constexpr Pass kSaved[] = {
    {"GELU's derivative as a kernel", 8, "writes the gradient of 4 C and reads it again"},
    {"bias gradients as sums over rows", 9, "reads the gradients of qkv (3), proj, fc (4) and fcproj"},
};
constexpr Pass kNotFused = {"GELU in the epilogue of the first layer's product", 4, "would not read its input again"};

double count(int64_t x) { return static_cast<double>(x); }
/// Seconds in a step of what moves `elements` x C a layer and token, in bf16.
double seconds_of(double elements, const models::GptConfig& c) {
  return 2 * elements * count(c.width * c.layers) * count(kTokens) / kCopy;
}

void print_passes(std::ostream& out) {
  out << "| a layer, per token | C elements |";
  for (const Goal& goal : kGoals) out << ' ' << goal.shape << " ms |";
  out << " |\n|---|---|---|---|---|---|\n";
  const auto line = [&](const Pass& pass, const char* prefix, const char* sign) {
    out << "| " << prefix << pass.name << " | " << sign << pass.elements << " |";
    for (const Goal& goal : kGoals)
      out << ' ' << sign << fixed(1e3 * seconds_of(pass.elements, step_shape(goal.shape).config), 1) << " |";
    out << ' ' << pass.what << " |\n";
  };
  double total = 0;
  for (const Pass& pass : kPasses) {
    line(pass, "", "");
    total += pass.elements;
  }
  line({"together", total, "the bound counts 18: each tensor once"}, "", "");
  for (const Pass& pass : kSaved) line(pass, "saved: ", "-");
  line(kNotFused, "not done: ", "-");
}

}  // namespace

void print_prediction(std::ostream& out) {
  out << "A step of " << grouped(kTokens) << " tokens in bf16, with products at " << fixed(kProducts * 1e-12, 0)
      << " TFLOP/s and copies at " << fixed(kCopy * 1e-12, 1)
      << " TB/s: a bound, in which\nnothing overlaps (docs/speed-of-light.md).\n\n"
      << "| shape | products | attention | passes | optimizer | least time | at most tokens/s | goal | of the bound |\n"
      << "|---|---|---|---|---|---|---|---|---|\n";
  for (const Goal& goal : kGoals) {
    const models::GptConfig& c = step_shape(goal.shape).config;
    models::MachineSpeed rates;
    rates.gemm_flops = kProducts, rates.copy_bytes = kCopy, rates.dtype = DType::bf16;
    const models::StepBound bound = models::step_bound(c, kTokens, rates);
    const auto part = [](double seconds, double amount, const char* unit) {
      return concat(fixed(amount, amount < 10 ? 1 : 0), ' ', unit, ", ", fixed(1e3 * seconds, seconds < 0.01 ? 1 : 0),
                    " ms");
    };
    const double most = count(kTokens) / bound.total();
    out << "| " << goal.shape << " | " << part(bound.products, bound.products * kProducts * 1e-12, "TFLOP") << " | "
        << part(bound.attention, bound.attention * kProducts * 1e-12, "TFLOP") << " | "
        << part(bound.passes, bound.passes * kCopy * 1e-9, "GB") << " | "
        << part(bound.optimizer, bound.optimizer * kCopy * 1e-9, "GB") << " | " << fixed(1e3 * bound.total(), 0)
        << " ms | " << grouped(static_cast<int64_t>(most)) << " | " << grouped(goal.tokens) << " | "
        << fixed(100 * count(goal.tokens) / most, 0) << "% |\n";
  }
  out << "\nWhat the kernels between products and attention move as they are queued, and what that takes of a "
         "step:\n\n";
  print_passes(out);
}

}  // namespace weft::apps
