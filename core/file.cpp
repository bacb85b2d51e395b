#include "core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace weft {
namespace {

/// strerror is not safe with threads; this is.
std::string system_message(int error) { return std::generic_category().message(error); }

/// A file descriptor that closes itself. Nothing is lost by ignoring close()'s result: writers call fsync first.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

int open_retrying(const char* path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = ::open(path, flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

/// Linux transfers at most 2 GiB - 4 KiB a call; a round number below it keeps pieces aligned.
constexpr size_t kLargestTransfer = size_t{1} << 30;

/// Writes all bytes at `offset`. Returns 0 or errno.
int write_all(int fd, std::span<const std::byte> bytes, uint64_t offset) {
  while (!bytes.empty()) {
    const size_t piece = std::min(bytes.size(), kLargestTransfer);
    const ssize_t n = ::pwrite(fd, bytes.data(), piece, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return EIO;
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += static_cast<uint64_t>(n);
  }
  return 0;
}

int fsync_retrying(int fd) {
  while (::fsync(fd) != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

std::string directory_of(const std::string& path) {
  const size_t slash = path.find_last_of('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

/// A path with a NUL inside would silently name another file.
void check_path(const std::string& path, const char* where) {
  if (path.empty()) fail(ErrorKind::kIo, where, "the file name is empty");
  if (path.find('\0') != std::string::npos)
    fail(ErrorKind::kIo, where, "the file name ", weft::quoted(path), " holds a NUL");
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  check_path(path, "map_file");
  // O_NONBLOCK: opening a named pipe must report "not a regular file", not wait for a writer.
  const Descriptor file(open_retrying(path.c_str(), O_RDONLY | O_NONBLOCK));
  if (file.get() < 0) fail(ErrorKind::kIo, "map_file", path, ": cannot open: ", system_message(errno));
  struct stat info{};
  if (::fstat(file.get(), &info) != 0) fail(ErrorKind::kIo, "map_file", path, ": fstat: ", system_message(errno));
  if (!S_ISREG(info.st_mode)) {
    fail(ErrorKind::kIo, "map_file", path, S_ISDIR(info.st_mode) ? ": is a directory" : ": is not a regular file");
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ == 0) return;  // an empty mapping is an error to mmap and an empty span to us
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) {
    fail(ErrorKind::kIo, "map_file", path, ": cannot map ", grouped(static_cast<int64_t>(size_)),
         " bytes: ", system_message(errno));
  }
  data_ = data;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

std::string read_file(const std::string& path) {
  check_path(path, "read_file");
  const Descriptor file(open_retrying(path.c_str(), O_RDONLY));
  if (file.get() < 0) fail(ErrorKind::kIo, "read_file", path, ": cannot open: ", system_message(errno));
  struct stat info{};
  if (::fstat(file.get(), &info) != 0) fail(ErrorKind::kIo, "read_file", path, ": fstat: ", system_message(errno));
  std::string content;
  // The size is a hint only: /proc files claim 0, and a file may grow. One byte more lets the loop see the end.
  content.resize(S_ISREG(info.st_mode) ? static_cast<size_t>(info.st_size) + 1 : size_t{1} << 16);
  size_t used = 0;
  for (;;) {
    if (used == content.size()) content.resize(content.size() * 2);
    const ssize_t n = ::read(file.get(), content.data() + used, std::min(content.size() - used, kLargestTransfer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(ErrorKind::kIo, "read_file", path, ": cannot read: ", system_message(errno));
    if (n == 0) break;
    used += static_cast<size_t>(n);
  }
  content.resize(used);
  return content;
}

AtomicFile::AtomicFile(const std::string& path) : path_(path), target_(path) {
  check_path(path, "write_file");
  mode_t mode = 0;
  struct stat info{};
  if (::stat(path.c_str(), &info) == 0) {
    // Renaming over a device, pipe or socket would replace it by a plain file.
    if (!S_ISREG(info.st_mode)) {
      fail(ErrorKind::kIo, "write_file", path, S_ISDIR(info.st_mode) ? ": is a directory" : ": is not a regular file");
    }
    mode = info.st_mode & 07777;
    if (char* real = ::realpath(path.c_str(), nullptr)) {
      target_ = real;
      std::free(real);
    }
  }
  static std::atomic<uint64_t> count = 0;
  // Another machine on a shared disk may use the same process id: O_EXCL decides, and the next number is tried.
  for (int attempt = 0; attempt < 1000 && descriptor_ < 0; ++attempt) {
    temporary_ = concat(directory_of(target_), "/.weft-tmp-", ::getpid(), '-', count.fetch_add(1));
    descriptor_ = open_retrying(temporary_.c_str(), O_RDWR | O_CREAT | O_EXCL, 0666);
    if (descriptor_ < 0 && errno != EEXIST) break;
  }
  if (descriptor_ < 0) {
    const int error = errno;
    temporary_.clear();  // not ours
    abandon("cannot create a file in its directory", error);
  }
  if (mode != 0 && ::fchmod(descriptor_, mode) != 0) abandon("cannot keep its mode", errno);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::abandon(const char* step, int error) {
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  if (!temporary_.empty()) ::unlink(std::exchange(temporary_, {}).c_str());
  fail(ErrorKind::kIo, "write_file", path_, ": ", step, ": ", system_message(error),
       error == ENOSPC || error == EDQUOT ? ". Hint: free disk space; an earlier file of this name is unchanged" : "");
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  if (descriptor_ < 0) fail(ErrorKind::kState, "write_file", path_, ": written to after commit() or a failure");
  if (const int error = write_all(descriptor_, bytes, size_)) abandon("cannot write", error);
  size_ += bytes.size();
}

void AtomicFile::write_at(uint64_t offset, std::span<const std::byte> bytes) {
  if (descriptor_ < 0) fail(ErrorKind::kState, "write_file", path_, ": written to after commit() or a failure");
  if (offset > size_ || bytes.size() > size_ - offset) {
    fail(ErrorKind::kValue, "write_file", path_, ": write_at of ", bytes.size(), " bytes at ", offset,
         " reaches beyond the ", size_, " bytes written; it may only overwrite");
  }
  if (const int error = write_all(descriptor_, bytes, offset)) abandon("cannot write", error);
}

void AtomicFile::write_back() {
  if (descriptor_ < 0) fail(ErrorKind::kState, "write_file", path_, ": write_back() after commit() or a failure");
  const auto sync = [&](uint64_t begin, uint64_t end, unsigned what) {
    if (begin == end) return;  // no bytes would mean all that follow
    const auto offset = static_cast<off64_t>(begin), count = static_cast<off64_t>(end - begin);
    int error = 0;
    while (::sync_file_range(descriptor_, offset, count, what) != 0 && (error = errno) == EINTR) error = 0;
    // Some file systems cannot: then commit() brings everything to the disk.
    if (error != 0 && error != ENOSYS && error != EINVAL && error != ESPIPE) abandon("cannot write", error);
  };
  sync(on_disk_, under_way_, SYNC_FILE_RANGE_WAIT_BEFORE);
  if (on_disk_ < under_way_) {  // advice: whether it is taken changes nothing else
    ::posix_fadvise(descriptor_, static_cast<off_t>(on_disk_), static_cast<off_t>(under_way_ - on_disk_),
                    POSIX_FADV_DONTNEED);
  }
  on_disk_ = under_way_;
  sync(under_way_, size_, SYNC_FILE_RANGE_WRITE);
  under_way_ = size_;
}

void AtomicFile::commit() {
  if (descriptor_ < 0) fail(ErrorKind::kState, "write_file", path_, ": commit() after commit() or a failure");
  if (const int error = fsync_retrying(descriptor_)) abandon("fsync", error);
  // Network file systems report a failed write as late as here.
  if (::close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR) abandon("close", errno);
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) abandon("cannot rename the temporary file to it", errno);
  temporary_.clear();
  fsync_directory(directory_of(target_));
}

void write_file_atomic(const std::string& path, std::span<const std::byte> bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_file_atomic(const std::string& path, std::string_view text) { write_file_atomic(path, as_bytes(text)); }

void fsync_directory(const std::string& directory) {
  check_path(directory, "fsync_directory");
  const Descriptor handle(open_retrying(directory.c_str(), O_RDONLY | O_DIRECTORY));
  if (handle.get() < 0) fail(ErrorKind::kIo, "fsync_directory", directory, ": cannot open: ", system_message(errno));
  // Some file systems cannot sync a directory and say EINVAL: there the rename is as durable as it gets.
  if (const int error = fsync_retrying(handle.get()); error != 0 && error != EINVAL) {
    fail(ErrorKind::kIo, "fsync_directory", directory, ": fsync: ", system_message(error));
  }
}

struct Hasher::State {
  State() : xxh(XXH3_createState()) {
    if (xxh == nullptr) throw std::bad_alloc();
    XXH3_128bits_reset(xxh);
  }
  ~State() { XXH3_freeState(xxh); }
  XXH3_state_t* xxh;
};

Hasher::Hasher() : state_(std::make_unique<State>()) {}
Hasher::Hasher(Hasher&&) noexcept = default;
Hasher& Hasher::operator=(Hasher&&) noexcept = default;
Hasher::~Hasher() = default;

Hasher& Hasher::update(std::span<const std::byte> bytes) {
  if (!bytes.empty()) XXH3_128bits_update(state_->xxh, bytes.data(), bytes.size());
  return *this;
}

std::array<std::byte, 16> Hasher::digest() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->xxh));
  std::array<std::byte, 16> bytes;
  static_assert(sizeof canonical == sizeof bytes);
  std::memcpy(bytes.data(), &canonical, sizeof bytes);
  return bytes;
}

std::string Hasher::hex() const {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte byte : digest()) {
    text += kDigits[std::to_integer<int>(byte >> 4)];
    text += kDigits[std::to_integer<int>(byte & std::byte{15})];
  }
  return text;
}

std::string hash_bytes(std::span<const std::byte> bytes) { return Hasher().update(bytes).hex(); }

std::string hash_file(const std::string& path) { return hash_bytes(MappedFile(path).bytes()); }

}  // namespace weft
