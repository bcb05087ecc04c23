package kvahead

// #cgo pkg-config: kvahead
// #include <kvahead.h>
import "C"

import (
	"fmt"
	"strings"
	"unsafe"
)

// Version is the version of the library that is loaded.
func Version() string { return C.GoString(C.kva_version()) }

// count reports the library's idea of how many elements a Go slice has.
func count[T any](s []T) C.size_t { return C.size_t(len(s)) }

// pointer returns the address of a slice's first element, nil for an empty one.
func pointer[T any](s []T) *T {
	if len(s) == 0 {
		return nil
	}
	return &s[0]
}

// tokenPointer is pointer for the token type of C, which is the same type under another name.
func tokenPointer(tokens []uint32) *C.uint32_t { return (*C.uint32_t)(unsafe.Pointer(pointer(tokens))) }

// checkText refuses what a C string cannot say, instead of cutting it short.
func checkText(what, text string) error {
	if i := strings.IndexByte(text, 0); i >= 0 {
		return &Error{Code: ErrInvalidArgument, Message: fmt.Sprintf("%s has a NUL byte at %d", what, i)}
	}
	return nil
}

// readTokens runs a call of the form (buffer, capacity, *count) for the count and then for the contents.
func readTokens(call func(tokens *C.uint32_t, capacity C.size_t, count *C.size_t) *C.kva_error) ([]uint32, error) {
	var n C.size_t
	if err := take(call(nil, 0, &n)); err != nil || n == 0 {
		return nil, err
	}
	tokens := make([]uint32, n)
	if err := take(call(tokenPointer(tokens), n, &n)); err != nil {
		return nil, err
	}
	return tokens[:n], nil
}

// readText does the same for text, whose capacity counts a NUL that its length does not.
func readText(call func(text *C.char, capacity C.size_t, length *C.size_t) *C.kva_error) (string, error) {
	var n C.size_t
	if err := take(call(nil, 0, &n)); err != nil || n == 0 {
		return "", err
	}
	text := make([]byte, n+1)
	if err := take(call((*C.char)(unsafe.Pointer(&text[0])), count(text), &n)); err != nil {
		return "", err
	}
	return string(text[:n]), nil
}
