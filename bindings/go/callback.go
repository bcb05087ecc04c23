package kvahead

// #include <stdint.h>
// #include <kvahead.h>
//
// int32_t kvaGoProgress(void *user_data, float fraction);
// void kvaGoLog(void *user_data, int32_t level, char *message);
// int32_t kvaGoText(void *user_data, uint32_t token, char *text, size_t text_len);
// void kvaGoFree(void *user_data);
//
// // A handle is a number: C carries it in the pointer without Go ever holding it as one.
// static void kvaGoSetProgress(kva_model_options *options, uintptr_t handle) {
//   options->progress = kvaGoProgress;
//   options->progress_user_data = (void *)handle;
//   options->progress_free_user_data = kvaGoFree;
// }
// static void kvaGoSetLog(kva_model_options *options, uintptr_t handle) {
//   options->log = (kva_log_callback)kvaGoLog;
//   options->log_user_data = (void *)handle;
//   options->log_free_user_data = kvaGoFree;
// }
// static kva_error *kvaGoCalibrate(kva_model *model, uintptr_t handle) {
//   return kva_model_calibrate(model, kvaGoProgress, (void *)handle, kvaGoFree);
// }
// static void kvaGoSetText(kva_generate_options *options, uintptr_t handle) {
//   options->callback = (kva_text_callback)kvaGoText;
//   options->user_data = (void *)handle;
//   options->free_user_data = kvaGoFree;
// }
import "C"

import (
	"fmt"
	"runtime/cgo"
	"unsafe"
)

// guarded is a function that C calls, and how it ended: with an error, or in a panic, which must not unwind through C.
type guarded[F any] struct {
	call     F
	err      error
	panicked any
}

// finish gives back what the function ended with, once the C frames below it are gone.
func (g *guarded[F]) finish(err error) error {
	if g.panicked != nil {
		panic(g.panicked)
	}
	if g.err != nil {
		return g.err
	}
	return err
}

// run calls body and reports whether C should stop.
func (g *guarded[F]) run(body func() error) (stop C.int32_t) {
	defer func() {
		if p := recover(); p != nil {
			g.panicked = fmt.Sprintf("kvahead: panic in a callback: %v", p)
			stop = 1
		}
	}()
	if g.err = body(); g.err != nil {
		return 1
	}
	return 0
}

type (
	progressCallback = guarded[func(float32) error]
	logCallback      = func(LogLevel, string)
	textCallback     = guarded[func(Piece) error]
)

// The library calls kvaGoFree exactly once for each handle that these give it.

func setProgress(options *C.kva_model_options, callback *progressCallback) {
	C.kvaGoSetProgress(options, C.uintptr_t(cgo.NewHandle(callback)))
}

func calibrate(model *C.kva_model, callback *progressCallback) *C.kva_error {
	return C.kvaGoCalibrate(model, C.uintptr_t(cgo.NewHandle(callback)))
}

func setLog(options *C.kva_model_options, callback logCallback) {
	C.kvaGoSetLog(options, C.uintptr_t(cgo.NewHandle(callback)))
}

func setText(options *C.kva_generate_options, callback *textCallback) {
	C.kvaGoSetText(options, C.uintptr_t(cgo.NewHandle(callback)))
}

func handle(userData unsafe.Pointer) cgo.Handle { return cgo.Handle(uintptr(userData)) }

//export kvaGoProgress
func kvaGoProgress(userData unsafe.Pointer, fraction C.float) C.int32_t {
	callback := handle(userData).Value().(*progressCallback)
	return callback.run(func() error { return callback.call(float32(fraction)) })
}

//export kvaGoLog
func kvaGoLog(userData unsafe.Pointer, level C.int32_t, message *C.char) {
	defer func() { _ = recover() }() // there is no call to report it to
	handle(userData).Value().(logCallback)(LogLevel(level), C.GoString(message))
}

//export kvaGoText
func kvaGoText(userData unsafe.Pointer, token C.uint32_t, text *C.char, length C.size_t) C.int32_t {
	callback := handle(userData).Value().(*textCallback)
	piece := Piece{Token: uint32(token), Text: string(unsafe.Slice((*byte)(unsafe.Pointer(text)), int(length)))}
	return callback.run(func() error { return callback.call(piece) })
}

//export kvaGoFree
func kvaGoFree(userData unsafe.Pointer) { handle(userData).Delete() }
