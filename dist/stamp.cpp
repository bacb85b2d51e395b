#include "dist/stamp.h"

#include "dist/wire.h"

namespace weft::dist {
namespace {

/// Whether an operation is defined by counts of rows for each rank.
bool has_counts(Collective op) {
  return op == Collective::reduce_scatter || op == Collective::all_gather || op == Collective::all_to_all;
}

bool same_row(const Shape& a, const Shape& b) {
  if (a.rank() != b.rank()) return false;
  for (int d = 1; d < a.rank(); ++d) {
    if (a[d] != b[d]) return false;
  }
  return true;
}

std::string list(const std::vector<int64_t>& values) {
  std::string out = "{";
  for (size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + "}";
}

}  // namespace

const char* name(Collective op) {
  static constexpr const char* kNames[kCollectives] = {"all_reduce", "reduce_scatter", "all_gather", "broadcast",
                                                       "all_to_all", "send",           "recv",       "barrier"};
  return kNames[static_cast<size_t>(op)];
}

const char* name(Reduction reduction) {
  static constexpr const char* kNames[] = {"sum", "max", "min", "avg"};
  return kNames[static_cast<size_t>(reduction)];
}

std::string place_name(const std::source_location& place) {
  const std::string_view file = place.file_name();
  return concat(file.substr(file.find_last_of('/') + 1), ':', place.line());
}

std::string Stamp::describe() const {
  std::string out = concat(name(op), " #", sequence, " of group \"", lane, '"');
  if (op != Collective::barrier) out += concat(", ", dtype, ' ', shape);
  if (op == Collective::all_reduce || op == Collective::reduce_scatter) out += concat(", ", name(reduction));
  if (op == Collective::broadcast) out += concat(", from rank ", root);
  if (has_counts(op)) out += concat(", counts ", list(send_counts));
  if (op == Collective::all_to_all) out += concat(" received ", list(receive_counts));
  return out + ", at " + place;
}

std::string Stamp::encode() const {
  WireWriter out;
  out.text(lane).put(sequence).put(op).put(dtype).put(reduction).put(root).put(members).put(shape.rank());
  for (const int64_t size : shape) out.put(size);
  for (const auto* counts : {&send_counts, &receive_counts}) {
    out.put(static_cast<uint32_t>(counts->size()));
    for (const int64_t count : *counts) out.put(count);
  }
  return out.text(place).take();
}

Stamp Stamp::decode(std::string_view bytes) {
  WireReader in(bytes);
  Stamp stamp;
  stamp.lane = in.text();
  stamp.sequence = in.get<uint64_t>();
  const auto op = in.get<uint8_t>(), dtype = in.get<uint8_t>(), reduction = in.get<uint8_t>();
  stamp.root = in.get<int>();
  stamp.members = in.get<uint64_t>();
  const int rank = in.get<int>();
  if (op >= kCollectives || dtype >= kDTypeCount || reduction > 3 || rank < 0 || rank > kMaxRank) {
    fail(ErrorKind::kData, "dist", "a stamp of another rank breaks its format. Hint: do all ranks run the same build?");
  }
  stamp.op = static_cast<Collective>(op);
  stamp.dtype = static_cast<DType>(dtype);
  stamp.reduction = static_cast<Reduction>(reduction);
  for (int d = 0; d < rank; ++d) stamp.shape.push_back(in.get<int64_t>());
  for (auto* counts : {&stamp.send_counts, &stamp.receive_counts}) {
    counts->resize(in.count(sizeof(int64_t)));
    for (int64_t& count : *counts) count = in.get<int64_t>();
  }
  stamp.place = in.text();
  in.end();
  return stamp;
}

std::optional<std::string> conflict(const Stamp& a, int rank_a, const Stamp& b, int rank_b) {
  const bool pair =
      (a.op == Collective::send && b.op == Collective::recv) || (a.op == Collective::recv && b.op == Collective::send);
  if (a.op != b.op && !pair) return "they are different operations";
  if (a.op == Collective::barrier) return std::nullopt;
  if (a.dtype != b.dtype) return "the dtypes differ";
  if ((a.op == Collective::all_reduce || a.op == Collective::reduce_scatter) && a.reduction != b.reduction) {
    return "the reductions differ";
  }
  if (a.root != b.root) return "the sources differ";
  if (!has_counts(a.op) || a.op == Collective::reduce_scatter) {
    if (!(a.shape == b.shape)) return "the shapes differ";
  } else if (!same_row(a.shape, b.shape)) {
    return "the shapes differ beyond dimension 0";
  }
  if (a.op == Collective::all_to_all) {
    const auto i = static_cast<size_t>(rank_a), j = static_cast<size_t>(rank_b);
    const auto differ = [](int from, int64_t sent, int to, int64_t received) {
      return concat("rank ", from, " sends ", sent, " rows to rank ", to, ", which receives ", received);
    };
    if (a.send_counts[j] != b.receive_counts[i]) return differ(rank_a, a.send_counts[j], rank_b, b.receive_counts[i]);
    if (b.send_counts[i] != a.receive_counts[j]) return differ(rank_b, b.send_counts[i], rank_a, a.receive_counts[j]);
  } else if (a.send_counts != b.send_counts) {
    return "the counts differ";
  }
  return std::nullopt;
}

}  // namespace weft::dist
