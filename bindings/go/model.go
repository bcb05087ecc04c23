package kvahead

// #include <stdlib.h>
// #include <kvahead.h>
import "C"

import (
	"runtime"
	"sync"
	"unsafe"
)

// Model is a loaded checkpoint. Its methods may be called from many goroutines.
type Model struct {
	mu     sync.RWMutex // held to read by calls in progress, to write by Close
	handle *C.kva_model // nil when closed
	vocab  int
}

// Load loads a Hugging Face folder or a GGUF file. Options may be nil.
func Load(path string, options *ModelOptions) (*Model, error) {
	return newModel("path", path, options, func(path *C.char, c *C.kva_model_options, handle **C.kva_model) *C.kva_error {
		return C.kva_model_load(path, c, handle)
	})
}

// Random makes a model of a named shape ("llama-2-7b") with random weights and no tokenizer, for measurements.
func Random(shape string, seed uint64, options *ModelOptions) (*Model, error) {
	return newModel("shape", shape, options, func(shape *C.char, c *C.kva_model_options, handle **C.kva_model) *C.kva_error {
		return C.kva_model_create_random(shape, C.uint64_t(seed), c, handle)
	})
}

func newModel(what, name string, options *ModelOptions,
	call func(name *C.char, c *C.kva_model_options, handle **C.kva_model) *C.kva_error,
) (*Model, error) {
	if err := checkText(what, name); err != nil {
		return nil, err
	}
	var a arena
	defer a.free()
	c := &alloc[C.kva_model_options](&a, 1)[0]
	if err := take(C.kva_model_options_init(c, C.sizeof_kva_model_options)); err != nil {
		return nil, err
	}
	var progress progressCallback
	if options != nil {
		c.device = C.int32_t(options.Device)
		c.dtype = C.int32_t(options.DType)
		c.threads = C.uint32_t(options.Threads)
		if options.CopyWeights {
			c.copy_weights = 1
		}
		c.kv_limit_bytes = C.uint64_t(options.KVLimitBytes)
		c.log_level = C.int32_t(options.LogLevel)
		cache, err := a.optionalText("SpeculationCachePath", options.SpeculationCachePath)
		if err != nil {
			return nil, err
		}
		c.speculation_cache_path = cache
		if options.CalibrationText != "" {
			c.calibration_text = a.text(options.CalibrationText)
			c.calibration_text_len = C.size_t(len(options.CalibrationText))
		}
		if options.Progress != nil {
			progress.call = options.Progress
			setProgress(c, &progress)
		}
		if options.Log != nil {
			setLog(c, options.Log)
		}
	}
	m := new(Model)
	err := take(call(a.text(name), c, &m.handle))
	if m.handle != nil {
		runtime.SetFinalizer(m, (*Model).Close)
	}
	if err := progress.finish(err); err != nil {
		m.Close()
		return nil, err
	}
	info, err := m.Info()
	if err != nil {
		m.Close()
		return nil, err
	}
	m.vocab = int(info.VocabularySize)
	return m, nil
}

// Close frees the model once no call uses it; its sessions and detokenizers stay usable. Later calls on the model fail with
// [ErrInvalidArgument]; a later Close does nothing.
func (m *Model) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	C.kva_model_free(m.handle)
	m.handle = nil
	runtime.SetFinalizer(m, nil)
	return nil
}

// use keeps the handle for the length of call.
func (m *Model) use(call func(*C.kva_model) error) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.handle == nil {
		return errClosed("model")
	}
	return call(m.handle)
}

// ModelInfo is what a model is.
type ModelInfo struct {
	Architecture    string
	Backend         string // what computes, for people
	DType           DType  // of the weights, or of what their blocks stand for
	WeightStorage   string // how the weights lie in memory, for people: "q4_1+q8_0 as bf16"
	Parameters      uint64
	WeightBytes     uint64
	Layers          uint32
	Heads           uint32
	KVHeads         uint32
	HeadDim         uint32
	HiddenSize      uint32
	VocabularySize  uint32
	ContextLength   uint64
	BOSToken        *uint32 // nil: none
	EOSToken        *uint32 // nil: none; the first of StopTokens
	HasTokenizer    bool
	HasChatTemplate bool
	LoadSeconds     float64
}

// Info describes the model.
func (m *Model) Info() (info ModelInfo, err error) {
	err = m.use(func(handle *C.kva_model) error {
		c := C.kva_model_info{struct_size: C.sizeof_kva_model_info}
		if err := take(C.kva_model_get_info(handle, &c)); err != nil {
			return err
		}
		info = ModelInfo{
			Architecture:    C.GoString(c.architecture),
			Backend:         C.GoString(c.backend),
			WeightStorage:   C.GoString(c.weight_storage),
			DType:           DType(c.dtype),
			Parameters:      uint64(c.parameters),
			WeightBytes:     uint64(c.weight_bytes),
			Layers:          uint32(c.layers),
			Heads:           uint32(c.heads),
			KVHeads:         uint32(c.kv_heads),
			HeadDim:         uint32(c.head_dim),
			HiddenSize:      uint32(c.hidden_size),
			VocabularySize:  uint32(c.vocabulary_size),
			ContextLength:   uint64(c.context_length),
			BOSToken:        optionalToken(c.bos_token),
			EOSToken:        optionalToken(c.eos_token),
			HasTokenizer:    c.has_tokenizer != 0,
			HasChatTemplate: c.has_chat_template != 0,
			LoadSeconds:     float64(c.load_seconds),
		}
		return nil
	})
	return info, err
}

func optionalToken(c C.uint32_t) *uint32 {
	if c == C.KVA_TOKEN_NONE {
		return nil
	}
	token := uint32(c)
	return &token
}

// Estimate is the memory that a model and some sessions of it would take.
type Estimate struct {
	WeightBytes   uint64
	KVDeviceBytes uint64
	KVPinnedBytes uint64
	KVFileBytes   uint64
	ScratchBytes  uint64 // once for the whole model

	ScratchPinnedBytes uint64 // of it, in pinned host memory
}

// Estimate says what that many full sessions with options would take.
func (m *Model) Estimate(options *SessionOptions, sessions int) (estimate Estimate, err error) {
	var a arena
	defer a.free()
	c, err := a.session(options)
	if err != nil {
		return estimate, err
	}
	if sessions < 0 {
		return estimate, &Error{Code: ErrInvalidArgument, Message: "the number of sessions is negative"}
	}
	err = m.use(func(handle *C.kva_model) error {
		e := C.kva_estimate{struct_size: C.sizeof_kva_estimate}
		if err := take(C.kva_model_estimate(handle, c, C.size_t(sessions), &e)); err != nil {
			return err
		}
		estimate = Estimate{
			WeightBytes:   uint64(e.weight_bytes),
			KVDeviceBytes: uint64(e.kv_device_bytes),
			KVPinnedBytes: uint64(e.kv_pinned_bytes),
			KVFileBytes:   uint64(e.kv_file_bytes),
			ScratchBytes:  uint64(e.scratch_bytes),

			ScratchPinnedBytes: uint64(e.scratch_pinned_bytes),
		}
		return nil
	})
	return estimate, err
}

// Calibrate learns from the calibration text what [Infinigen] speculates with, or reads it from the cache; otherwise the
// first session with that policy does. Progress, which may be nil, is called with the fraction done; an error stops the
// calibration, which returns it.
func (m *Model) Calibrate(progress func(fraction float32) error) error {
	callback := progressCallback{call: progress}
	err := m.use(func(handle *C.kva_model) error {
		if progress == nil {
			return take(C.kva_model_calibrate(handle, nil, nil, nil))
		}
		return take(calibrate(handle, &callback))
	})
	return callback.finish(err)
}

// SetTiming says what decode steps measure of themselves from now on. ErrUnsupported for anything but [TimingOff] where
// the device is the processor.
func (m *Model) SetTiming(timing Timing) error {
	return m.use(func(handle *C.kva_model) error { return take(C.kva_model_set_timing(handle, C.int32_t(timing))) })
}

// WriteTimeline writes when each operation of the last decode step began and ended to a file, as Chrome's trace events.
func (m *Model) WriteTimeline(path string) error {
	var a arena
	defer a.free()
	c, err := a.optionalText("path", path)
	if err != nil {
		return err
	}
	return m.use(func(handle *C.kva_model) error { return take(C.kva_model_write_timeline(handle, c)) })
}

// Tokenize turns text into tokens.
func (m *Model) Tokenize(text string, flags TokenizeFlags) (tokens []uint32, err error) {
	bytes := []byte(text)
	err = m.use(func(handle *C.kva_model) (err error) {
		tokens, err = readTokens(func(tokens *C.uint32_t, capacity C.size_t, n *C.size_t) *C.kva_error {
			text := (*C.char)(unsafe.Pointer(pointer(bytes)))
			return C.kva_model_tokenize(handle, text, count(bytes), C.uint32_t(flags), tokens, capacity, n)
		})
		return err
	})
	return tokens, err
}

// Detokenize turns tokens into text. For tokens that arrive one at a time use a [Detokenizer], which never cuts a
// character in two.
func (m *Model) Detokenize(tokens []uint32, flags DetokenizeFlags) (text string, err error) {
	err = m.use(func(handle *C.kva_model) (err error) {
		text, err = readText(func(text *C.char, capacity C.size_t, length *C.size_t) *C.kva_error {
			return C.kva_model_detokenize(handle, tokenPointer(tokens), count(tokens), C.uint32_t(flags), text, capacity, length)
		})
		return err
	})
	return text, err
}

// StopTokens are the tokens after which the model's texts end.
func (m *Model) StopTokens() (tokens []uint32, err error) {
	err = m.use(func(handle *C.kva_model) (err error) {
		tokens, err = readTokens(func(tokens *C.uint32_t, capacity C.size_t, n *C.size_t) *C.kva_error {
			return C.kva_model_get_stop_tokens(handle, tokens, capacity, n)
		})
		return err
	})
	return tokens, err
}

// Message is one message of a conversation.
type Message struct {
	Role    string // system, user, assistant
	Content string
}

// ApplyChatTemplate writes a conversation as one text in the model's own form, to be tokenized with [ParseSpecial] alone.
// With addGenerationPrompt it ends where the model's answer begins.
func (m *Model) ApplyChatTemplate(messages []Message, addGenerationPrompt bool) (text string, err error) {
	var a arena
	defer a.free()
	c := alloc[C.kva_chat_message](&a, len(messages))
	for i, message := range messages {
		if err := checkText("a message's role", message.Role); err != nil {
			return "", err
		}
		if err := checkText("a message's content", message.Content); err != nil {
			return "", err
		}
		c[i] = C.kva_chat_message{role: a.text(message.Role), content: a.text(message.Content)}
	}
	var open C.uint32_t
	if addGenerationPrompt {
		open = 1
	}
	err = m.use(func(handle *C.kva_model) (err error) {
		text, err = readText(func(text *C.char, capacity C.size_t, length *C.size_t) *C.kva_error {
			return C.kva_model_apply_chat_template(handle, pointer(c), count(c), open, text, capacity, length)
		})
		return err
	})
	return text, err
}
