package kvahead

// #include <kvahead.h>
import "C"

import (
	"runtime"
	"sync"
)

// Detokenizer turns tokens that arrive one at a time into text, in whole characters.
type Detokenizer struct {
	mu     sync.Mutex
	handle *C.kva_detokenizer // nil when closed
}

// NewDetokenizer makes a detokenizer.
func (m *Model) NewDetokenizer(flags DetokenizeFlags) (*Detokenizer, error) {
	d := new(Detokenizer)
	err := m.use(func(handle *C.kva_model) error {
		return take(C.kva_detokenizer_create(handle, C.uint32_t(flags), &d.handle))
	})
	if err != nil {
		return nil, err
	}
	runtime.SetFinalizer(d, (*Detokenizer).Close)
	return d, nil
}

// Push takes the next token and returns the text that has become certain by it, which may be empty.
func (d *Detokenizer) Push(token uint32) (string, error) {
	return d.text(func(text **C.char, length *C.size_t) *C.kva_error {
		return C.kva_detokenizer_push(d.handle, C.uint32_t(token), text, length)
	})
}

// Finish returns what was held back for a character that never came whole. The detokenizer is then as new.
func (d *Detokenizer) Finish() (string, error) {
	return d.text(func(text **C.char, length *C.size_t) *C.kva_error {
		return C.kva_detokenizer_finish(d.handle, text, length)
	})
}

func (d *Detokenizer) text(call func(text **C.char, length *C.size_t) *C.kva_error) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.handle == nil {
		return "", errClosed("detokenizer")
	}
	var text *C.char
	var length C.size_t
	if err := take(call(&text, &length)); err != nil {
		return "", err
	}
	return C.GoStringN(text, C.int(length)), nil
}

// Close frees the detokenizer. A second Close does nothing.
func (d *Detokenizer) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	C.kva_detokenizer_free(d.handle)
	d.handle = nil
	runtime.SetFinalizer(d, nil)
	return nil
}
