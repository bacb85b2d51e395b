#include <algorithm>
#include <iomanip>
#include <limits>
#include <ostream>
#include <utility>

#include "models/verify/verify.h"

namespace weft::models {
namespace {

/// Enough digits to tell any two doubles apart.
std::string exactly(double value) {
  std::ostringstream out;
  out << std::setprecision(std::numeric_limits<double>::max_digits10) << value;
  return std::move(out).str();
}

std::string with_digits(double value, int digits) {
  std::ostringstream out;
  out << std::setprecision(digits) << value;
  return std::move(out).str();
}

/// "[3, 5]" for an element of a tensor.
std::string place_in(const Shape& shape, int64_t element) {
  std::string text;
  for (int d = shape.rank() - 1; d >= 0; --d) {
    text = concat(element % shape[d], text.empty() ? "" : ", ", text);
    element /= shape[d];
  }
  return "[" + text + "]";
}

/// "rank 3 (dp 1, pp 1)".
std::string rank_in(const dist::Mesh& mesh, int rank) {
  std::string text = concat("rank ", rank), at;
  if (rank >= mesh.size()) return text;
  const dist::Mesh::Coordinates coordinates = mesh.coordinates_of(rank);
  for (const dist::Axis axis : dist::kAllAxes) {
    if (mesh.size(axis) == 1) continue;
    at += concat(at.empty() ? "" : ", ", dist::name(axis), ' ', coordinates[static_cast<size_t>(axis)]);
  }
  return at.empty() ? text : concat(text, " (", at, ")");
}

void print_difference(std::ostream& out, const Verification& verification, const Difference& d) {
  const dist::Mesh& mesh = verification.layouts[d.layout].mesh;
  out << "different, first in step " << d.step << " on mesh " << quoted(mesh.to_string()) << ":\n  " << name(d.what)
      << (d.what == Compared::kNorm ? ", " : " of ") << d.tensor;
  const bool in_tensor = d.what != Compared::kLoss && d.what != Compared::kNorm;
  if (in_tensor) out << ' ' << d.shape << ", element " << place_in(d.shape, d.element);
  if (d.missing) {
    out << ": no rank has it\n";
  } else {
    out << " is " << exactly(d.got);
    if (d.ranks.size() == 1 || d.what != Compared::kLoss) out << " on " << rank_in(mesh, d.ranks.front());
    out << ", " << exactly(d.expected) << (d.copies ? " elsewhere" : " on one rank alone");
    if (d.bound > 0) out << "; they may differ by " << with_digits(d.bound, 3);
    out << "\n";
  }
  if (d.ranks.size() > 1) {
    const bool loss = d.what == Compared::kLoss;
    out << (loss ? "  ranks that compute it, or are told so:" : "  also on");
    const char* between = " ";
    for (size_t i = loss ? 0 : 1; i < d.ranks.size(); ++i)
      out << std::exchange(between, ", ") << rank_in(mesh, d.ranks[i]);
    out << "\n";
  }
  out << "  " << d.different << " of " << d.compared
      << (d.what == Compared::kLoss ? " losses" : concat(' ', name(d.what), 's')) << " of this step differ\n";
  if (d.origin) {
    out << "  begins in the forward pass of micro-batch " << d.origin->micro_batch << " on "
        << rank_in(mesh, d.origin->rank) << ", " << d.origin->place << ": element " << d.origin->element
        << " of its output is " << exactly(d.origin->got) << ", alone " << exactly(d.origin->expected);
    if (d.origin->bound > 0) out << (", and may be " + with_digits(d.origin->bound, 3) + " off");
    out << "\n";
  }
  if (!d.note.empty()) out << "  " << d.note << "\n";
}

void print_errors(std::ostream& out, const VerifyReport& report, bool all) {
  std::vector<BoundedError> errors;
  std::copy_if(report.errors.begin(), report.errors.end(), std::back_inserter(errors),
               [](const BoundedError& error) { return error.bound > 0 || error.difference > 0; });
  const size_t equal = report.errors.size() - errors.size();
  std::stable_sort(errors.begin(), errors.end(),
                   [](const BoundedError& a, const BoundedError& b) { return a.ratio() > b.ratio(); });
  constexpr size_t kShown = 8;
  const size_t shown = all ? errors.size() : std::min(errors.size(), kShown);
  out << "with tp or cp: " << equal << " tensors have the same bits in every step, " << errors.size() << " others"
      << (shown < errors.size() ? concat(", ", shown, " of them here") : "") << "\n"
      << std::left << std::setw(50) << "" << std::right << std::setw(12) << "difference" << std::setw(12) << "bound"
      << std::setw(10) << "ratio" << "\n";
  for (size_t i = 0; i < shown; ++i) {
    const BoundedError& error = errors[i];
    out << "  " << std::left << std::setw(48) << concat(name(error.what), ' ', error.tensor) << std::right
        << std::setw(12) << with_digits(error.difference, 3) << std::setw(12) << with_digits(error.bound, 3)
        << std::setw(10) << with_digits(error.ratio(), 2) << "\n";
  }
}

}  // namespace

void print_report(std::ostream& out, const Verification& verification, const VerifyReport& report, bool all_errors) {
  out << std::left << std::setw(12) << "compared" << std::right << std::setw(12) << "tensors" << std::setw(16)
      << "elements" << std::setw(12) << "different" << "\n";
  for (int kind = 0; kind < kComparedKinds; ++kind) {
    const VerifyReport::Tally& tally = report.tallies[static_cast<size_t>(kind)];
    out << std::left << std::setw(12) << name(static_cast<Compared>(kind)) << std::right << std::setw(12)
        << grouped(tally.tensors) << std::setw(16) << grouped(tally.elements) << std::setw(12)
        << grouped(tally.different) << "\n";
  }
  if (!report.errors.empty()) print_errors(out, report, all_errors);
  if (report.first) {
    print_difference(out, verification, *report.first);
  } else {
    out << (report.exact ? "equal in every bit\n" : "equal within the bounds\n");
  }
}

}  // namespace weft::models
