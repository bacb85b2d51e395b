// Saving checkpoints: by one process or by the ranks of a group, at once or in the background. How a directory appears
// and goes is in directory.cpp, who writes what in plan.cpp.
#include "models/checkpoint/saver.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/autograd.h"
#include "core/log.h"
#include "dist/texts.h"
#include "models/checkpoint/background.h"
#include "models/checkpoint/directory.h"
#include "models/checkpoint/manifest.h"
#include "models/checkpoint/plan.h"
#include "models/checkpoint/snapshot.h"

namespace weft {
namespace {

using checkpoint::HeldPiece;
using checkpoint::Kind;
using checkpoint::kKinds;
using checkpoint::kManifestFile;
using checkpoint::kModelFile;
using checkpoint::kOptimizerFile;
using Json = nlohmann::json;

constexpr const char* kWhere = "save_checkpoint";
const std::map<std::string, std::string> kMetadata = {{"format", "weft"}};

/// What failed on a rank, as others are told.
struct Failure {
  ErrorKind kind = ErrorKind::kIo;
  std::string text;
};

Failure failure_of(const std::exception_ptr& exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    return {error.kind(), error.what()};
  } catch (const std::exception& error) {
    return {ErrorKind::kIo, concat('[', kWhere, "] ", error.what())};
  }
}

/// Tells the other ranks `mine` and hears what they have, or that one of them failed: then all throw that.
std::vector<Json> exchange(dist::Group* group, const Json& mine, const std::exception_ptr& failed) {
  if (group == nullptr) {
    if (failed) std::rethrow_exception(failed);
    return {mine};
  }
  Json message = {{"is", mine}};
  if (failed) {
    const Failure failure = failure_of(failed);
    message = {{"kind", static_cast<int>(failure.kind)}, {"failed", failure.text}};
  }
  constexpr auto kReplace = Json::error_handler_t::replace;  // paths may be of any bytes
  const std::vector<std::string> texts = dist::gather_texts(*group, message.dump(-1, ' ', false, kReplace));
  std::vector<Json> all;
  for (size_t rank = 0; rank < texts.size(); ++rank) {
    const Json theirs = Json::parse(texts[rank]);
    if (theirs.contains("failed")) {
      // "[where] what" becomes "[where] rank 2: what".
      std::string text = theirs["failed"].get<std::string>();
      const size_t end = text.starts_with('[') ? text.find("] ") : std::string::npos;
      text.insert(end == std::string::npos ? 0 : end + 2, concat("rank ", rank, ": "));
      throw Error(static_cast<ErrorKind>(theirs["kind"].get<int>()), text);
    }
    all.push_back(theirs["is"]);
  }
  return all;
}

/// What `run` throws, or null.
template <class Run>
std::exception_ptr failure_in(const Run& run) {
  try {
    run();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void check_content(const std::string& root, const ShardedContent& content, const SaveCheckpointOptions& options) {
  const auto refuse = [](const auto&... parts) { fail(ErrorKind::kValue, kWhere, parts...); };
  if (root.empty()) refuse("the directory to save in is empty");
  if (content.step < 0) refuse("step must not be negative, got ", content.step);
  if (content.data_cursor < 0) refuse("data_cursor must not be negative, got ", content.data_cursor);
  if (options.keep_n < 0) refuse("keep_n must be 0 (keep all) or more, got ", options.keep_n);
  for (const auto& [name, text] : content.text_files) {
    if (!checkpoint::is_file_name(name)) {
      refuse("the text file name ", weft::quoted(name),
             " is not of letters, digits, '.', '_' and '-', begins with '.', or ", "has more than 128 characters");
    }
    if (name == kManifestFile || checkpoint::is_tensor_file_name(name)) {
      refuse("a text file may not be named ", name, ": the checkpoint has a file of that name");
    }
  }
  checkpoint::manifest_text({content, {}});  // refuses texts that are not UTF-8
}

const std::vector<StoredTensor>& of_kind(const ShardedContent& content, Kind kind) {
  return kind == Kind::model ? content.model : content.optimizer;
}

TensorPart part_of(const StoredTensor& stored) {
  if (!stored.tensor.defined()) fail(ErrorKind::kValue, kWhere, "tensor ", quoted(stored.name), " is undefined");
  if (!stored.part) return TensorPart::all(stored.tensor.shape());
  if (stored.tensor.numel() != stored.part->count()) {
    fail(ErrorKind::kValue, kWhere, "tensor ", quoted(stored.name), " is ", stored.tensor.describe(),
         ", which is not the part ", describe(*stored.part), " of ", grouped(stored.part->count()), " elements");
  }
  return *stored.part;
}

std::vector<HeldPiece> held_pieces(const ShardedContent& content) {
  std::vector<HeldPiece> held;
  for (const Kind kind : kKinds) {
    std::set<std::string> names;
    for (const StoredTensor& stored : of_kind(content, kind)) {
      if (!names.insert(stored.name).second)
        fail(ErrorKind::kValue, kWhere, "two tensors are named ", quoted(stored.name));
      held.push_back({kind, stored.name, stored.tensor.dtype(), part_of(stored)});
    }
  }
  return held;
}

Json to_json(const std::vector<HeldPiece>& held) {
  Json list = Json::array();
  for (const HeldPiece& piece : held) {
    const TensorPart& part = piece.part;
    Json ranges = Json::array();
    for (const IndexRange& range : part.ranges) ranges.push_back({range.begin, range.end});
    list.push_back({static_cast<int>(piece.kind), piece.name, static_cast<int>(piece.dtype),
                    std::vector<int64_t>(part.whole.begin(), part.whole.end()), part.dim, ranges, part.begin,
                    part.end});
  }
  return list;
}

std::vector<HeldPiece> held_pieces(const Json& list) {
  std::vector<HeldPiece> held;
  for (const Json& each : list) {
    HeldPiece piece{static_cast<Kind>(each[0].get<int>()), each[1], static_cast<DType>(each[2].get<int>()), {}};
    piece.part.whole = Shape(each[3].get<std::vector<int64_t>>());
    piece.part.dim = each[4];
    for (const Json& range : each[5]) piece.part.ranges.push_back({range[0], range[1]});
    piece.part.begin = each[6], piece.part.end = each[7];
    held.push_back(std::move(piece));
  }
  return held;
}

/// `part` of a tensor, as a file holds it, in the tensor's own memory.
Tensor to_write(const StoredTensor& stored, const TensorPart& part) {
  const autograd::NoGrad no_grad;
  const int64_t begin = stored.part ? stored.part->begin : 0;
  Tensor tensor = stored.tensor.detach();
  if (part.count() < tensor.numel()) tensor = tensor.reshape({-1}).narrow(0, part.begin - begin, part.count());
  return tensor.reshape(part.shape());
}

/// What is written and hashed at once in the background: a tenth to a fifth of a millisecond of a processor.
constexpr size_t kPiece = size_t{256} << 10;
/// What the disk is given at once meanwhile: others who use it wait for no more than twice that.
constexpr size_t kWriteBack = size_t{1} << 20;

}  // namespace

/// A save under way.
struct CheckpointSaver::Save {
  CheckpointManifest manifest;
  std::map<std::string, std::string> text_files;             ///< those that this rank writes
  std::array<std::string, 2> files;                          ///< [kind] that this rank writes, or ""
  std::array<NamedTensors, 2> tensors;                       ///< [kind] in them
  std::unique_ptr<checkpoint::PendingCheckpoint> directory;  ///< on the rank that makes it
  std::string path;                                          ///< of the directory
  const SaveCheckpointOptions* options = nullptr;

  std::vector<CheckpointFile> written;  ///< by this rank, and once `listed`, on rank 0, by all
  bool listed = false;                  ///< all ranks have written, and know it: the checkpoint is to be published
  std::string published;                ///< the path, by then, on rank 0
  std::exception_ptr failed;

  size_t kind = 0;                                 ///< of the file that is being written; 2: of text
  std::unique_ptr<SafetensorsWriter> file;         ///< it, if it has begun
  size_t not_on_disk = 0;                          ///< bytes of it since the last write_back()
  std::optional<checkpoint::BackgroundWork> work;  ///< last: it uses all of the above

  void done(std::string_view step) const {
    if (options->after_step) options->after_step(step);
  }

  void add(const std::string& name, const std::string& hash) {
    std::error_code error;
    const uintmax_t size = std::filesystem::file_size(path + "/" + name, error);
    if (error) checkpoint::fail_io(path + "/" + name, "cannot read the size of", error.value());
    written.push_back({name, static_cast<int64_t>(size), hash});
    done(name);
  }

  /// Puts copies in the place of the tensors.
  void copy() {
    const MemoryScope scope(MemoryCategory::checkpoint);
    std::vector<Tensor> all;
    for (const NamedTensors& of_kind : tensors) {
      for (const auto& [name, tensor] : of_kind) all.push_back(tensor);
    }
    all = checkpoint::snapshot(all);
    auto next = all.begin();
    for (NamedTensors& of_kind : tensors) {
      for (auto& [name, tensor] : of_kind) tensor = *next++;
    }
  }

  void begin_pieces() {
    if (!anything_to_do()) return;
    // Without threads the save fails, on all ranks and when it would be published.
    const std::exception_ptr no_threads =
        failure_in([&] { work.emplace([this](bool beside) { return do_piece(beside); }); });
    if (no_threads) failed = no_threads;
  }

  /// Returns when nothing is left to do or something has failed.
  void finish_pieces() {
    if (work) {
      work->finish();
    } else if (!failed && anything_to_do()) {
      while (do_piece(false)) {
      }
    }
  }

  bool anything_to_do() const {
    return listed ? directory && published.empty() : kind < kKinds.size() || !text_files.empty();
  }

  /// Does the next piece and returns whether there is another. What it throws ends all and is in `failed`.
  bool do_piece(bool beside) {
    const MemoryScope scope(MemoryCategory::checkpoint);
    failed = failure_in([&] {
      if (listed) {
        published = publish();
      } else if (kind < kKinds.size()) {
        write_tensors(beside);
      } else {
        const auto text = text_files.extract(text_files.begin());
        write_file_atomic(path + "/" + text.key(), text.mapped());
        add(text.key(), hash_bytes(as_bytes(text.mapped())));
      }
    });
    return !failed && anything_to_do();
  }

  void write_tensors(bool beside) {
    const std::string& name = files[kind];
    if (!file) file = std::make_unique<SafetensorsWriter>(path + "/" + name, tensors[kind], kMetadata);
    if (file->write(kPiece)) {
      not_on_disk += kPiece;
      if (!beside || not_on_disk < kWriteBack) return;
      file->write_back();
      not_on_disk = 0;
      return;
    }
    add(name, file->commit());
    file.reset();
    tensors[kind].clear();
    next_kind(kind + 1);
  }

  /// Goes to the first kind from `from` on of which this rank writes a file.
  void next_kind(size_t from) {
    kind = from;
    while (kind < kKinds.size() && files[kind].empty()) ++kind;
    not_on_disk = 0;
  }

  /// Lists what all ranks have written, and gives the directory its name.
  std::string publish() {
    const checkpoint::TensorFiles names = checkpoint::tensor_files(manifest);
    const auto place = [&](const CheckpointFile& file) {
      return names.model.contains(file.name) ? 0 : names.optimizer.contains(file.name) ? 1 : 2;
    };
    std::sort(written.begin(), written.end(), [&](const CheckpointFile& a, const CheckpointFile& b) {
      return std::pair(place(a), a.name) < std::pair(place(b), b.name);
    });
    for (const CheckpointFile& file : written) {
      std::error_code error;
      if (std::filesystem::file_size(path + "/" + file.name, error) == static_cast<uintmax_t>(file.size)) continue;
      fail(ErrorKind::kIo, kWhere, path, "/", file.name, ": was written with ", grouped(file.size),
           " bytes and is not there. Hint: the directory must be one that all ranks see");
    }
    manifest.files = std::move(written);
    write_file_atomic(path + "/" + kManifestFile, checkpoint::manifest_text(manifest));
    done(kManifestFile);
    return directory->publish();
  }
};

CheckpointSaver::CheckpointSaver(std::string root, dist::Group* group, SaveCheckpointOptions options)
    : root_(std::move(root)),
      group_(group != nullptr && group->size() > 1 ? group : nullptr),
      options_(std::move(options)) {}

CheckpointSaver::~CheckpointSaver() = default;

void CheckpointSaver::start(const ShardedContent& content, bool background) {
  if (save_)
    fail(ErrorKind::kState, kWhere, "the save of step ", save_->manifest.step, " must be finished before the next");
  auto save = std::make_unique<Save>();
  save->options = &options_;
  const int rank = group_ == nullptr ? 0 : group_->rank();
  static_cast<CheckpointInfo&>(save->manifest) = content;
  if (rank == 0) save->text_files = content.text_files;
  std::vector<HeldPiece> mine;
  std::exception_ptr failed = failure_in([&] {
    check_content(root_, content, options_);
    if (group_ != nullptr) {
      mine = held_pieces(content);
      return;
    }
    save->files = {kModelFile, kOptimizerFile};
    for (const Kind kind : kKinds) {
      for (const StoredTensor& each : of_kind(content, kind)) {
        if (const TensorPart part = part_of(each); !part.is_whole())
          fail(ErrorKind::kValue, kWhere, "tensor ", quoted(each.name),
               " is a part, and no other rank has the rest: ", describe(part));
      }
    }
  });
  // What of its tensors the rank writes, by kind and name.
  std::map<std::pair<Kind, std::string>, TensorPart> own;
  const std::vector<Json> all = exchange(group_, {content.step, to_json(mine)}, failed);
  if (group_ != nullptr) {
    std::vector<std::vector<HeldPiece>> held;
    for (size_t other = 0; other < all.size(); ++other) {
      if (all[other][0] != all[0][0])
        fail(ErrorKind::kValue, kWhere, "rank 0 saves step ", all[0][0], " and rank ", other, " step ", all[other][0]);
      held.push_back(held_pieces(all[other][1]));
    }
    checkpoint::SavePlan plan = checkpoint::plan_save(held);
    save->files = plan.files[static_cast<size_t>(rank)];
    for (const Kind kind : kKinds) {
      const auto k = static_cast<size_t>(kind);
      for (const CheckpointTensor& tensor : plan.tensors[k]) {
        for (const CheckpointPiece& piece : tensor.pieces) {
          if (piece.file == save->files[k]) own.emplace(std::pair(kind, tensor.name), piece.part);
        }
      }
    }
    save->manifest.version = 2;
    save->manifest.model = std::move(plan.tensors[0]);
    save->manifest.optimizer = std::move(plan.tensors[1]);
  }
  failed = failure_in([&] {
    for (const Kind kind : kKinds) {
      for (const StoredTensor& each : of_kind(content, kind)) {
        const auto found = own.find({kind, each.name});
        if (group_ != nullptr && found == own.end()) continue;
        const TensorPart part = group_ == nullptr ? TensorPart::all(part_of(each).whole) : found->second;
        save->tensors[static_cast<size_t>(kind)].emplace_back(each.name, to_write(each, part));
      }
    }
    if (background) save->copy();
    if (rank != 0) return;
    save->directory = std::make_unique<checkpoint::PendingCheckpoint>(root_, content.step, options_);
    save->path = save->directory->directory();
  });
  save->path = exchange(group_, save->path, failed)[0].get<std::string>();
  if (rank != 0) save->done("directory");
  save_ = std::move(save);
  save_->next_kind(0);
  if (background) save_->begin_pieces();
}

void CheckpointSaver::begin(const ShardedContent& content) { start(content, true); }

std::string CheckpointSaver::save(const ShardedContent& content) {
  start(content, false);
  return *finish();
}

bool CheckpointSaver::pending() const { return save_ != nullptr; }
bool CheckpointSaver::writing() const { return save_ && save_->work && !save_->work->done(); }

void CheckpointSaver::list_files(Save& save) {
  save.finish_pieces();
  save.work.reset();
  Json mine = Json::array();
  for (const CheckpointFile& file : save.written) mine.push_back({file.name, file.size, file.hash});
  const std::vector<Json> all = exchange(group_, mine, save.failed);
  save.written.clear();
  for (const Json& rank : all) {
    for (const Json& file : rank) save.written.push_back({file[0], file[1], file[2]});
  }
  save.listed = true;
  if (!save.directory) save.failed = failure_in([&] { save.done("written"); });
}

std::optional<std::string> CheckpointSaver::poll(bool anywhere) {
  if (!save_ || anywhere) return std::nullopt;
  if (save_->listed) return finish();
  std::unique_ptr<Save> save = std::move(save_);
  list_files(*save);
  save->begin_pieces();
  save_ = std::move(save);
  return std::nullopt;
}

std::optional<std::string> CheckpointSaver::finish() {
  if (!save_) return std::nullopt;
  const std::unique_ptr<Save> save = std::move(save_);  // whatever fails from here on, it is over
  if (!save->listed) list_files(*save);
  save->finish_pieces();
  const std::string path = exchange(group_, save->published, save->failed)[0].get<std::string>();
  if (!save->directory) save->done("end");
  return path;
}

std::string background_writing() {
  checkpoint::GivenWay given;
  std::thread([&] { given = checkpoint::give_way(); }).join();
  const double percent = 100 * checkpoint::BackgroundWork::kShare;
  return concat(given.text, given.processor ? "; where no processor is idle, " : "; ", percent, "% of one");
}

std::string save_checkpoint(const std::string& root, const CheckpointContent& content,
                            const SaveCheckpointOptions& options) {
  ShardedContent whole;
  static_cast<CheckpointInfo&>(whole) = content;
  whole.model = stored_whole(content.model);
  whole.optimizer = stored_whole(content.optimizer);
  whole.text_files = content.text_files;
  return CheckpointSaver(root, nullptr, options).save(whole);
}

std::vector<StoredTensor> stored_whole(const NamedTensors& tensors) {
  std::vector<StoredTensor> stored;
  for (const auto& [name, tensor] : tensors) stored.push_back({name, tensor});
  return stored;
}

std::vector<StoredTensor> stored_parameters(const Parameters& parameters) {
  std::vector<StoredTensor> stored;
  for (const Parameter& parameter : parameters) stored.push_back({parameter.name, parameter.tensor, parameter.part});
  return stored;
}

std::vector<StoredTensor> stored_state(const NamedTensors& state, const Parameters& parameters) {
  std::map<std::string_view, const Parameter*> by_name;
  for (const Parameter& parameter : parameters) by_name.emplace(parameter.name, &parameter);
  std::vector<StoredTensor> stored;
  for (const auto& [name, tensor] : state) {
    stored.push_back({name, tensor});
    const auto found = by_name.find(std::string_view(name).substr(0, name.rfind('.')));
    if (found != by_name.end()) stored.back().part = found->second->part;
  }
  return stored;
}

NamedTensors load_stored(const CheckpointTensors& tensors, const std::vector<StoredTensor>& wanted,
                         dist::Group* group) {
  dist::Group* others = group != nullptr && group->size() > 1 ? group : nullptr;
  NamedTensors loaded;
  std::set<std::string_view> names;
  const std::exception_ptr failed = failure_in([&] {
    for (const StoredTensor& want : wanted) {
      names.insert(want.name);
      const TensorPart part = want.part ? *want.part : TensorPart::all(want.tensor.shape());
      loaded.emplace_back(want.name, tensors.load(want.name, part).reshape(want.tensor.shape()));
    }
  });
  std::vector<uint8_t> claimed;
  for (const CheckpointTensor& each : tensors.tensors()) claimed.push_back(names.contains(each.name));
  for (const Json& rank : exchange(others, claimed, failed)) {
    for (size_t i = 0; i < claimed.size(); ++i) claimed[i] |= rank[i].get<uint8_t>();
  }
  for (size_t i = 0; i < claimed.size(); ++i) {
    if (claimed[i]) continue;
    const std::vector<std::string_view> known(names.begin(), names.end());
    const std::string& name = tensors.tensors()[i].name;
    fail(ErrorKind::kData, "load_checkpoint", tensors.source(), ": holds the tensor ", quoted(name),
         ", which the program does not have", did_you_mean(name, known));
  }
  return loaded;
}

OpenCheckpoint open_checkpoint(const std::string& path, dist::Group& group) {
  std::optional<OpenCheckpoint> opened;
  int64_t number = 0;
  const std::exception_ptr failed = failure_in([&] {
    opened = checkpoint::open(path, [&](const CheckpointFile&) { return number++ % group.size() == group.rank(); });
  });
  exchange(group.size() > 1 ? &group : nullptr, Json(), failed);
  return *std::move(opened);
}

}  // namespace weft
