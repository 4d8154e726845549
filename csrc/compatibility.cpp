// What the headers of a new compiler use and older libraries lack: the extension brings it along, so that it can be
// loaded with the libraries of manylinux_2_28.  Without this, the linker finds some of it in libtorch, by chance.
#include <new>
#include <sstream>

#ifdef __GLIBCXX__
// glibc 2.32. A value other than 0 would save atomic operations in a process that has only one thread.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// libstdc++ of GCC 11 and of GCC 9.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
#endif
