package kvahead

// #include <stdlib.h>
// #include <kvahead.h>
import "C"

import (
	"sort"
	"unsafe"
)

// arena holds C memory for the length of one call: what C structs point to may not be Go memory.
type arena []unsafe.Pointer

func (a *arena) free() {
	for _, p := range *a {
		C.free(p)
	}
}

func (a *arena) text(s string) *C.char {
	p := C.CString(s)
	*a = append(*a, unsafe.Pointer(p))
	return p
}

// optionalText is NULL for an empty s.
func (a *arena) optionalText(what, s string) (*C.char, error) {
	if s == "" {
		return nil, nil
	}
	if err := checkText(what, s); err != nil {
		return nil, err
	}
	return a.text(s), nil
}

// alloc returns zeroed C memory for n elements, nil for none.
func alloc[T any](a *arena, n int) []T {
	if n == 0 {
		return nil
	}
	var element T
	p := C.calloc(C.size_t(n), C.size_t(unsafe.Sizeof(element)))
	*a = append(*a, p)
	return unsafe.Slice((*T)(p), n)
}

// texts returns a C array of C strings.
func (a *arena) texts(what string, list []string) (**C.char, error) {
	array := alloc[*C.char](a, len(list))
	for i, s := range list {
		if err := checkText(what, s); err != nil {
			return nil, err
		}
		array[i] = a.text(s)
	}
	return pointer(array), nil
}

func (a *arena) tokens(tokens []uint32) *C.uint32_t {
	array := alloc[uint32](a, len(tokens))
	copy(array, tokens)
	return tokenPointer(array)
}

func (a *arena) sampling(o *SamplingOptions) (*C.kva_sampling_options, error) {
	c := &alloc[C.kva_sampling_options](a, 1)[0]
	if err := take(C.kva_sampling_options_init(c, C.sizeof_kva_sampling_options)); err != nil || o == nil {
		return c, err
	}
	c.temperature = C.float(o.Temperature)
	c.top_k = C.uint32_t(o.TopK)
	if o.TopP != 0 {
		c.top_p = C.float(o.TopP)
	}
	c.min_p = C.float(o.MinP)
	if o.RepetitionPenalty != 0 {
		c.repetition_penalty = C.float(o.RepetitionPenalty)
	}
	c.frequency_penalty = C.float(o.FrequencyPenalty)
	c.presence_penalty = C.float(o.PresencePenalty)
	c.penalty_window = C.uint32_t(o.PenaltyWindow)
	c.seed = C.uint64_t(o.Seed)
	biases := alloc[C.kva_logit_bias](a, len(o.LogitBias))
	tokens := make([]uint32, 0, len(o.LogitBias))
	for token := range o.LogitBias {
		tokens = append(tokens, token)
	}
	sort.Slice(tokens, func(i, j int) bool { return tokens[i] < tokens[j] })
	for i, token := range tokens {
		biases[i] = C.kva_logit_bias{token: C.uint32_t(token), bias: C.float(o.LogitBias[token])}
	}
	c.logit_bias = pointer(biases)
	c.logit_bias_count = count(biases)
	return c, nil
}

func (a *arena) generate(o *GenerateOptions) (*C.kva_generate_options, error) {
	c := &alloc[C.kva_generate_options](a, 1)[0]
	if err := take(C.kva_generate_options_init(c, C.sizeof_kva_generate_options)); err != nil || o == nil {
		return c, err
	}
	sampling, err := a.sampling(&o.Sampling)
	if err != nil {
		return nil, err
	}
	stops, err := a.texts("stop string", o.StopStrings)
	if err != nil {
		return nil, err
	}
	c.max_tokens = C.uint64_t(o.MaxTokens)
	c.sampling = sampling
	if o.IgnoreModelStopTokens {
		c.ignore_stop_tokens = 1
	}
	c.stop_tokens = a.tokens(o.StopTokens)
	c.stop_token_count = count(o.StopTokens)
	c.stop_strings = stops
	c.stop_string_count = count(o.StopStrings)
	return c, nil
}
