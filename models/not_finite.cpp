#include "models/not_finite.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <sstream>

#include "core/autograd.h"
#include "dist/texts.h"

namespace weft::models {
namespace {

constexpr const char* kWhere = "trainer";

struct NotFinite {
  int64_t element;
  double value;
};

std::optional<NotFinite> first_not_finite(const Tensor& tensor) {
  const autograd::NoGrad no_grad;
  const std::vector<double> values = tensor.to_vector<double>();
  const auto found = std::find_if(values.begin(), values.end(), [](double value) { return !std::isfinite(value); });
  if (found == values.end()) return std::nullopt;
  return NotFinite{found - values.begin(), *found};
}

/// A tensor that is not finite: its place in the order of execution, and what there is to say of it.
struct Finding {
  std::array<int64_t, 3> place;
  std::string text;
};

/// ", on rank 3 (pp=1, tp=1)"; "" if there is only one.
std::string on_rank(const ParallelGpt* parallel, int rank) {
  if (parallel == nullptr || parallel->options().mesh.size() == 1) return "";
  const dist::Mesh& mesh = parallel->options().mesh;
  const dist::Mesh::Coordinates at = mesh.coordinates_of(rank);
  std::string where;
  for (const dist::Axis axis : dist::kAllAxes) {
    if (mesh.size(axis) == 1) continue;
    where += concat(where.empty() ? "" : ", ", dist::name(axis), '=', at[static_cast<size_t>(axis)]);
  }
  return concat(", on rank ", rank, " (", where, ")");
}

/// What the ranks have found that comes first, the same on all; of equals that of the lowest rank.
std::optional<Finding> first_of_all(ParallelGpt* parallel, const std::optional<Finding>& own) {
  if (parallel == nullptr || parallel->world().size() == 1) return own;
  std::string message;
  if (own) message = concat(own->place[0], ' ', own->place[1], ' ', own->place[2], ' ', own->text);
  std::optional<Finding> first;
  const std::vector<std::string> all = dist::gather_texts(parallel->world(), message);
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank].empty()) continue;
    std::istringstream in(all[rank]);
    Finding found;
    in >> found.place[0] >> found.place[1] >> found.place[2] >> std::ws;
    std::getline(in, found.text, '\0');
    if (first && !(found.place < first->place)) continue;
    found.text += on_rank(parallel, static_cast<int>(rank));
    first = std::move(found);
  }
  return first;
}

/// The element of the whole tensor that is element `at` of a part of it.
int64_t whole_element(const TensorPart& part, int64_t at) {
  int64_t whole = at;
  part.for_each_run([&](int64_t in_whole, int64_t in_part, int64_t count) {
    if (at >= in_part && at < in_part + count) whole = in_whole + at - in_part;
  });
  return whole;
}

enum class Order : uint8_t { forward, backward };

/// Of this rank's parameters the first, in that order of layers, whose `tensor_of` is not finite.
/// @param say  what there is to say of it: the parameter, the tensor, the value and the element of the whole tensor
template <class TensorOf, class Say>
std::optional<Finding> first_parameter(const FailedStep& failed, Order order, const TensorOf& tensor_of,
                                       const Say& say) {
  const Parameters held = failed.gpt.parameters();
  std::map<std::string, int64_t> number;
  for (const Parameter& parameter : held) number.emplace(parameter.name, static_cast<int64_t>(number.size()));
  const Parameters own = failed.parallel != nullptr ? failed.parallel->parameters() : held;
  const std::vector<TensorPart> parts =
      failed.parallel != nullptr ? failed.parallel->parts() : std::vector<TensorPart>();
  std::optional<Finding> first;
  for (size_t i = 0; i < own.size(); ++i) {
    const Tensor tensor = tensor_of(own[i]);
    const auto at = tensor.defined() ? first_not_finite(tensor) : std::nullopt;
    if (!at) continue;
    const int64_t element = parts.empty() ? at->element : whole_element(parts[i], at->element);
    const int64_t sign = order == Order::forward ? 1 : -1;
    const std::array<int64_t, 3> place = {sign * layer_of(own[i].name, failed.gpt.config()),
                                          sign * number.at(own[i].name), element};
    if (!first || place < first->place) first = Finding{place, say(own[i], tensor, at->value, element)};
  }
  return first;
}

/// The first tensor that a forward pass of this rank's micro-batches gives and that is not finite.
std::optional<Finding> first_output(const FailedStep& failed) {
  const Parameters held = failed.gpt.parameters();
  std::optional<Finding> first;
  std::array<int64_t, 3> place = {0, 0, 0};  // micro-batch, first layer of the stage, function
  std::string weights = "before the first weight";
  const autograd::RecordObserver observer(
      [&](const char* op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
        if (first) return;
        ++place[2];
        std::string used;
        for (const Tensor& input : inputs) {
          for (const Parameter& parameter : held) {
            if (input.defined() && input.storage() == parameter.tensor.storage())
              used += (used.empty() ? "" : ", ") + parameter.name;
          }
        }
        if (!used.empty()) weights = "at or after " + used;
        for (const Tensor& output : outputs) {
          const auto at = is_float(output.dtype()) ? first_not_finite(output) : std::nullopt;
          if (!at) continue;
          const bool shared = failed.parallel != nullptr && failed.parallel->world().size() > 1;
          first = Finding{
              place, concat("the output of ", op, " ", output.describe(), ", ", weights, ", with ", at->value,
                            " at element ", grouped(at->element), shared ? concat(", in micro-batch ", place[0]) : "")};
          return;
        }
      });
  if (failed.parallel == nullptr) {
    for (size_t i = 0; i < failed.batches.size() && !first; ++i)
      failed.gpt.loss(failed.batches[i].inputs, failed.batches[i].targets, failed.settings(i));
  } else {
    failed.parallel->forward_again(failed.batches, failed.settings, [&](int64_t micro_batch, int64_t first_layer) {
      if (place[0] != micro_batch) place[2] = 0;
      place[0] = micro_batch, place[1] = first_layer;
    });
  }
  return first;
}

}  // namespace

void explain_loss(const FailedStep& failed, double loss) {
  const std::string what = concat("the loss of step ", failed.step, " is ", loss, ": ");
  constexpr const char* kAfter = ". No weight was changed by this step. Hint: a lower learning rate or more warm-up";
  const auto weight = first_parameter(
      failed, Order::forward, [](const Parameter& parameter) { return parameter.tensor; },
      [](const Parameter& parameter, const Tensor&, double value, int64_t element) {
        return concat("weight ", quoted(parameter.name), " is ", value, " at element ", grouped(element));
      });
  if (const auto found = first_of_all(failed.parallel, weight))
    fail(ErrorKind::kValue, kWhere, what, found->text, kAfter);
  if (const auto found = first_of_all(failed.parallel, first_output(failed)))
    fail(ErrorKind::kValue, kWhere, what, "every weight is finite, and the first tensor that is not is ", found->text,
         kAfter);
  fail(ErrorKind::kValue, kWhere, what,
       "every weight and every tensor of the forward pass is finite: the sum over the micro-batches overflowed",
       kAfter);
}

void explain_gradients(const FailedStep& failed) {
  const auto own = first_parameter(
      failed, Order::backward, [](const Parameter& parameter) { return parameter.tensor.grad(); },
      [](const Parameter& parameter, const Tensor& gradient, double value, int64_t element) {
        return concat("the gradient of ", quoted(parameter.name), " (", gradient.describe(), ") is ", value,
                      " at element ", grouped(element));
      });
  if (const auto found = first_of_all(failed.parallel, own))
    fail(ErrorKind::kValue, kWhere, found->text,
         "; the step was not taken. Hint: a lower learning rate, more warm-up or clipping");
}

}  // namespace weft::models
