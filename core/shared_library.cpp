#include "core/shared_library.h"

#include <dlfcn.h>

#include <utility>

#include "core/error.h"

namespace weft {

SharedLibrary::SharedLibrary(std::string title, const std::vector<std::string>& names) : title_(std::move(title)) {
  for (const std::string& name : names) {
    handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) {
      name_ = name;
      return;
    }
    const char* const words = dlerror();
    why_not_ += concat(why_not_.empty() ? "" : "; ", words == nullptr ? name : words);
  }
}

void* SharedLibrary::address(const char* symbol) const { return handle_ == nullptr ? nullptr : dlsym(handle_, symbol); }

void* SharedLibrary::required(const char* symbol) const {
  if (handle_ == nullptr) {
    fail(ErrorKind::kDevice, title_, "the library is needed and was not found: ", why_not_,
         ". Hint: install it, or name its directory in LD_LIBRARY_PATH");
  }
  void* const found = dlsym(handle_, symbol);
  if (found == nullptr) {
    fail(ErrorKind::kDevice, title_, name_, " has no ", symbol,
         ". Hint: the library must be as new as the one that this program was built with");
  }
  return found;
}

}  // namespace weft
