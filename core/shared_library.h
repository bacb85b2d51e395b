#pragma once
#include <string>
#include <vector>

namespace weft {

/// A library that is looked for when it is needed, so that a program which never needs it does not pay for loading it.
/// Once loaded it stays until the program ends.
class SharedLibrary {
 public:
  /// Loads the first that there is. @param title  what people call it. @param names  file names, for which the system's
  /// loader searches its directories, or paths
  SharedLibrary(std::string title, const std::vector<std::string>& names);

  bool found() const { return handle_ != nullptr; }
  /// A function by its symbol; null without the library, or if it has none of that name.
  template <class Function>
  Function* find(const char* symbol) const {
    return reinterpret_cast<Function*>(address(symbol));
  }
  /// Sets `function` to the one with that symbol. @throws Error kDevice naming what was tried if the library was not
  /// found, or the symbol that it lacks.
  template <class Function>
  void require(Function*& function, const char* symbol) const {
    function = reinterpret_cast<Function*>(required(symbol));
  }

 private:
  void* address(const char* symbol) const;
  void* required(const char* symbol) const;

  std::string title_, name_;
  std::string why_not_;  ///< the loader's words on every name
  void* handle_ = nullptr;
};

}  // namespace weft
