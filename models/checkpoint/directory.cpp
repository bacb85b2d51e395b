// Directories of checkpoints: how one appears, replaces another and is removed, so that no kill, power failure or full
// disk costs one that was complete: a new one is made durable under a temporary name and renamed last; an old one is
// renamed to a temporary name before it is deleted.
#include "models/checkpoint/directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <thread>

#include "core/log.h"
#include "models/checkpoint/manifest.h"

namespace weft::checkpoint {

void fail_io(const std::string& path, const char* step, int error) {
  fail(ErrorKind::kIo, "save_checkpoint", path, ": ", step, ": ", std::generic_category().message(error),
       error == ENOSPC || error == EDQUOT ? ". Hint: free disk space; earlier checkpoints are unchanged" : "");
}

namespace {

constexpr const char* kLockFile = ".weft-lock";
constexpr std::string_view kBeingWritten = ".tmp-step_";
constexpr std::string_view kBeingRemoved = ".tmp-removed-step_";

/// Whether the path itself, not what a link points to, is a directory.
bool is_directory(const std::string& path) {
  struct stat info{};
  return ::lstat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

/// Deletes a directory of plain files. Anything else in it stays, and so does the directory. Returns 0 or errno.
int delete_flat(const std::string& directory) {
  std::optional<std::vector<std::string>> names;
  try {
    names = entries(directory);
  } catch (const Error&) {
    return errno != 0 ? errno : EIO;
  }
  int first_error = 0;
  for (const std::string& name : names.value_or(std::vector<std::string>{})) {
    const std::string path = directory + "/" + name;
    if (::unlink(path.c_str()) != 0 && errno != ENOENT && first_error == 0) first_error = errno;
  }
  if (::rmdir(directory.c_str()) != 0 && errno != ENOENT && first_error == 0) first_error = errno;
  return first_error;
}

/// While it lives, no other save works in the directory, of this process or another. The system ends it with the
/// process.
class RootLock {
 public:
  RootLock(const std::string& root, double seconds) {
    const std::string path = root + "/" + kLockFile;
    descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (descriptor_ < 0) fail_io(path, "cannot open the lock of this directory", errno);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    for (;;) {
      if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0) {
        exclusive_ = true;
        return;
      }
      const int error = errno;
      if (error == EINTR) continue;
      if (error != EWOULDBLOCK) return;  // a file system without locks: exclusive() is false
      if (std::chrono::steady_clock::now() >= deadline) {
        ::close(descriptor_);
        fail(ErrorKind::kIo, "save_checkpoint", root, ": another save into this directory has not ended within ",
             seconds, " s. Hint: give each run its own directory");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }
  RootLock(const RootLock&) = delete;
  RootLock& operator=(const RootLock&) = delete;
  ~RootLock() { ::close(descriptor_); }

  bool exclusive() const { return exclusive_; }

 private:
  int descriptor_ = -1;
  bool exclusive_ = false;
};

}  // namespace

struct PendingCheckpoint::Impl {
  Impl(std::string root, int64_t step, SaveCheckpointOptions options)
      : root_(std::move(root)), step_(step), options_(std::move(options)) {
    make_root();
    lock_.emplace(root_, options_.lock_seconds);
    done("lock");
    if (lock_->exclusive()) clean_up();
    temporary_ = make_temporary();
    try {
      done("directory");
    } catch (...) {
      delete_flat(temporary_);
      throw;
    }
  }
  ~Impl() {
    if (!published_) delete_flat(temporary_);
  }

  std::string publish() {
    fsync_directory(temporary_);
    done("sync");
    std::string name = rename_finished();
    // From here on the checkpoint is complete and durable: what follows is housekeeping, and its failures are logged.
    done("publish");
    name = replace_same_step(name);
    if (options_.keep_n > 0) remove_older();
    warn_of_later();
    done("end");
    lock_.reset();
    return root_ + "/" + name;
  }

  void done(std::string_view step) const {
    if (options_.after_step) options_.after_step(step);
  }

  std::string at(const std::string& name) const { return root_ + "/" + name; }

  void make_root() const {
    if (entries(root_)) return;
    namespace fs = std::filesystem;
    std::error_code error;
    // Each new directory is durable once the one above it is.
    std::vector<std::string> above;
    for (fs::path path = fs::absolute(root_, error).lexically_normal();
         !fs::exists(path, error) && path.has_relative_path(); path = path.parent_path()) {
      above.push_back(path.parent_path().string());
    }
    fs::create_directories(root_, error);
    if (error) fail_io(root_, "cannot make this directory", error.value());
    for (const std::string& directory : above) fsync_directory(directory);
  }

  /// Deletes what dead processes have left: whoever holds the lock is the only one at work here.
  void clean_up() const {
    for (const std::string& name : entries(root_).value_or(std::vector<std::string>{})) {
      if (!name.starts_with(kBeingWritten) && !name.starts_with(kBeingRemoved)) continue;
      if (!is_directory(at(name))) continue;
      if (const int error = delete_flat(at(name))) {
        log::warn(at(name), ": cannot delete what a save has left behind: ", std::generic_category().message(error));
      }
      done("clean");
    }
  }

  std::string make_temporary() const {
    const std::string base = at(".tmp-" + to_string({step_, 1}) + "-" + std::to_string(::getpid()));
    for (int attempt = 1;; ++attempt) {
      const std::string path = attempt == 1 ? base : base + "-" + std::to_string(attempt);
      if (::mkdir(path.c_str(), 0777) == 0) return path;
      if (errno != EEXIST || attempt == 100) fail_io(path, "cannot make this directory", errno);
    }
  }

  /// Gives the complete directory a name that is free, so that nothing has to make way before it is there.
  std::string rename_finished() {
    DirectoryName name{step_, 1};
    for (const DirectoryName& taken : directories(root_)) {
      if (taken.step == name.step) name.revision = std::max(name.revision, taken.revision + 1);
    }
    const std::string path = at(to_string(name));
    if (::rename(temporary_.c_str(), path.c_str()) != 0)
      fail_io(path, "cannot rename the finished checkpoint to it", errno);
    published_ = true;
    done("rename");
    fsync_directory(root_);
    return to_string(name);
  }

  /// Removes the other checkpoints of this step and gives the new one their name. Returns the name it has in the end.
  std::string replace_same_step(const std::string& name) const {
    const std::string plain = to_string({step_, 1});
    if (name == plain) return name;
    for (const DirectoryName& other : directories(root_)) {
      const std::string old = to_string(other);
      if (other.step != step_ || old == name) continue;
      if (!remove(old)) set_aside(old);
      done("replace");
    }
    if (::access(at(plain).c_str(), F_OK) == 0 || ::rename(at(name).c_str(), at(plain).c_str()) != 0) {
      log::warn(at(plain), " could not be replaced: the new checkpoint is ", at(name));
      return name;
    }
    done("rename again");
    sync_root();
    return plain;
  }

  void remove_older() const {
    std::vector<std::string> complete;  // newest first
    const std::vector<DirectoryName> names = directories(root_);
    for (auto name = names.rbegin(); name != names.rend(); ++name) {
      if (name->step >= step_) continue;
      try {
        check_sizes(at(to_string(*name)));
        complete.push_back(to_string(*name));
      } catch (const Error&) {
        // Broken: it neither counts nor goes. Somebody may still want what is left of it.
      }
    }
    for (size_t i = static_cast<size_t>(options_.keep_n) - 1; i < complete.size(); ++i) {
      remove(complete[i]);
      done("remove");
    }
  }

  /// A run that went back to an earlier step would continue from the wrong place when it is resumed.
  void warn_of_later() const {
    const std::vector<DirectoryName> names = directories(root_);
    if (names.empty() || names.back().step <= step_) return;
    log::warn(at(to_string(names.back())), " is of a later step than ", step_,
              ", which was just saved: a search for the latest checkpoint finds it first. Hint: move it away");
  }

  /// Deletes a checkpoint if it is one and nothing else is in it. A kill on the way leaves it whole, or under a name
  /// that says that it is going.
  bool remove(const std::string& name) const {
    const std::string path = at(name);
    std::string obstacle;
    if (!holds_a_checkpoint_only(path, obstacle)) {
      log::warn(path, " is not removed: ", obstacle);
      return false;
    }
    const std::string going = at(".tmp-removed-" + name + "-" + std::to_string(::getpid()));
    if (::rename(path.c_str(), going.c_str()) != 0) {
      log::warn(path, " cannot be removed: ", std::generic_category().message(errno));
      return false;
    }
    done("going");
    // The new name must be on disk before the first file goes.
    sync_root();
    if (const int error = delete_flat(going)) {
      log::warn(going, " cannot be deleted: ", std::generic_category().message(error));
    }
    return true;
  }

  static bool holds_a_checkpoint_only(const std::string& path, std::string& obstacle) {
    if (!is_directory(path)) {
      obstacle = "it is not a directory";
      return false;
    }
    try {
      const CheckpointManifest manifest = read_checkpoint_manifest(path);
      for (const std::string& name : entries(path).value_or(std::vector<std::string>{})) {
        const auto& files = manifest.files;
        const bool ours =
            name == kManifestFile ||
            std::any_of(files.begin(), files.end(), [&](const CheckpointFile& file) { return file.name == name; });
        if (!ours || is_directory(path + "/" + name)) {
          obstacle = "it holds " + weft::quoted(name) + ", which is no part of the checkpoint";
          return false;
        }
      }
    } catch (const Error& error) {
      obstacle = error.what();
      return false;
    }
    return true;
  }

  /// Renames what has the name of a checkpoint and may not be deleted.
  void set_aside(const std::string& name) const {
    for (int i = 1; i <= 1000; ++i) {
      const std::string to = at(name + ".replaced-" + std::to_string(i));
      struct stat info{};
      if (::lstat(to.c_str(), &info) == 0) continue;
      if (::rename(at(name).c_str(), to.c_str()) == 0) {
        log::warn(at(name), " is now ", to);
        return;
      }
      break;
    }
    log::warn(at(name), " cannot be renamed: ", std::generic_category().message(errno));
  }

  void sync_root() const {
    try {
      fsync_directory(root_);
    } catch (const Error& error) {
      log::warn(error.what());
    }
  }

  const std::string root_;
  const int64_t step_;
  const SaveCheckpointOptions options_;
  std::optional<RootLock> lock_;
  std::string temporary_;
  bool published_ = false;
};

PendingCheckpoint::PendingCheckpoint(const std::string& root, int64_t step, const SaveCheckpointOptions& options)
    : impl_(std::make_unique<Impl>(root, step, options)) {}
PendingCheckpoint::~PendingCheckpoint() = default;
const std::string& PendingCheckpoint::directory() const { return impl_->temporary_; }
std::string PendingCheckpoint::publish() { return impl_->publish(); }

}  // namespace weft::checkpoint
