package kvahead

// #include <kvahead.h>
import "C"

import "fmt"

// ErrorCode says what went wrong, in terms that a program can act on. It is an error, for use with errors.Is; errors that
// the package returns are of type *[Error].
type ErrorCode int32

// The codes. A later library may know more.
const (
	ErrInvalidArgument ErrorCode = C.KVA_ERROR_INVALID_ARGUMENT // out of range, of the wrong size, closed
	ErrNotFound        ErrorCode = C.KVA_ERROR_NOT_FOUND        // a file or folder does not exist
	ErrInvalidFormat   ErrorCode = C.KVA_ERROR_INVALID_FORMAT   // a file is not a valid checkpoint or tokenizer
	ErrUnsupported     ErrorCode = C.KVA_ERROR_UNSUPPORTED      // valid, but not for this build, machine or model
	ErrOutOfMemory     ErrorCode = C.KVA_ERROR_OUT_OF_MEMORY    // memory could not be had
	ErrCapacity        ErrorCode = C.KVA_ERROR_CAPACITY         // the session's context, or a memory budget, is full
	ErrIO              ErrorCode = C.KVA_ERROR_IO               // the operating system reported an input/output error
	ErrBusy            ErrorCode = C.KVA_ERROR_BUSY             // another goroutine is using the session
	ErrCancelled       ErrorCode = C.KVA_ERROR_CANCELLED        // by a context, Session.Cancel or a progress function
	ErrDevice          ErrorCode = C.KVA_ERROR_DEVICE           // the compute device failed or is not there
	ErrInternal        ErrorCode = C.KVA_ERROR_INTERNAL         // a defect in kvahead: please report it
)

var codeNames = map[ErrorCode]string{
	ErrInvalidArgument: "invalid argument",
	ErrNotFound:        "not found",
	ErrInvalidFormat:   "invalid format",
	ErrUnsupported:     "unsupported",
	ErrOutOfMemory:     "out of memory",
	ErrCapacity:        "capacity",
	ErrIO:              "input/output",
	ErrBusy:            "busy",
	ErrCancelled:       "cancelled",
	ErrDevice:          "device",
	ErrInternal:        "internal",
}

func (c ErrorCode) Error() string {
	if name, ok := codeNames[c]; ok {
		return "kvahead: " + name
	}
	return fmt.Sprintf("kvahead: error %d", int32(c))
}

// Error is an error of the library. errors.Is matches it with its [ErrorCode], and a cancelled call's with the context's
// error.
type Error struct {
	Code    ErrorCode
	Message string // names the argument or file, its value, and what would be right

	cause error
}

func (e *Error) Error() string { return "kvahead: " + e.Message }

// Is reports whether target is the error's code.
func (e *Error) Is(target error) bool {
	code, ok := target.(ErrorCode)
	return ok && code == e.Code
}

// Unwrap returns what made the library give up: a context's error, or nil.
func (e *Error) Unwrap() error { return e.cause }

// take turns an error of C into one of Go, and frees it.
func take(e *C.kva_error) error {
	if e == nil {
		return nil
	}
	defer C.kva_error_free(e)
	return &Error{Code: ErrorCode(C.kva_error_code(e)), Message: C.GoString(C.kva_error_message(e))}
}

func errClosed(what string) error {
	return &Error{Code: ErrInvalidArgument, Message: "the " + what + " is closed"}
}
