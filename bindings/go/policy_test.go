package kvahead

import (
	"math"
	"testing"
)

func TestInfinigenDefaults(t *testing.T) {
	standard := must(NewInfinigenOptions(InfinigenDefault))(t)
	paper := must(NewInfinigenOptions(InfinigenPaper))(t)
	if standard.Rule != ProbabilityRule || standard.Basis != BalancedIndex || standard.IndexBits != 4 || !standard.AttendCache || !standard.Tail ||
		standard.Cache.Share == 0 || standard.CacheLeast == 0 {
		t.Errorf("defaults %+v", standard)
	}
	if paper.Rule != PaperRule || paper.Alpha != 4 || paper.Predictor != OwnPredictor || paper.AttendCache || paper.Tail || paper.Window != 0 {
		t.Errorf("paper %+v", paper)
	}
	_, err := NewInfinigenOptions(7)
	wantError(t, err, ErrInvalidArgument, "mode is 7")
}

func TestPolicyOptionsAreChecked(t *testing.T) {
	model := testModel(t)
	zero := uint32(0)
	infinigen := func(change func(*InfinigenOptions)) *InfinigenOptions {
		options := must(NewInfinigenOptions(InfinigenDefault))(t)
		change(options)
		return options
	}
	// An estimate checks options exactly as a session does.
	for _, right := range []*SessionOptions{
		{Policy: Int4},
		{Policy: H2O, Budget: Budget{Share: 0.5}},
		{Policy: Window, Budget: Budget{Tokens: 4}, Sinks: &zero},
		{Policy: Window}, // the default is not a budget of 0
		{Policy: Infinigen},
		{Policy: Infinigen, Infinigen: infinigen(func(o *InfinigenOptions) { o.Cache = Budget{Tokens: 100} })},
		{KVTier: FileTier, KVFilePath: "/tmp/kv", KVFileFlags: KeepFile | ChecksumFile, KVFileLimitBytes: 1 << 30},
		{Policy: Infinigen, Eviction: EvictionCounter, PoolTokens: 100},
	} {
		if _, err := model.Estimate(right, 1); err != nil {
			t.Errorf("%+v: %v", right, err)
		}
	}
	nan := float32(math.NaN())
	for text, wrong := range map[string]*SessionOptions{
		"options.policy is 9":               {Policy: 9},
		"options.kv_tier is -1":             {KVTier: -1},
		"options.kv_payload is 3":           {KVPayload: 3},
		"options.eviction is 4":             {Eviction: 4},
		"0x40 is no KVA_KV_FILE flag":       {KVTier: FileTier, KVFileFlags: 0x40},
		"cannot be kept":                    {KVTier: FileTier, KVFileFlags: KeepFile},
		"not KVA_KV_TIER_FILE":              {KVFilePath: "/tmp/kv"},
		"NUL":                               {TracePath: "a\x00b"},
		"budget is NaN":                     {Policy: Window, Budget: Budget{Share: nan}},
		"budget is 4 tokens":                {Policy: Window, Budget: Budget{Tokens: 4}},
		"eviction needs policy infinigen":   {Eviction: EvictionLRU},
		"ratio is 2":                        {Policy: Infinigen, Infinigen: infinigen(func(o *InfinigenOptions) { o.Ratio = 2 })},
		"correct is -1":                     {Policy: Infinigen, Infinigen: infinigen(func(o *InfinigenOptions) { o.Correct = -1 })},
		"index_bits is 5":                   {Policy: Infinigen, Infinigen: infinigen(func(o *InfinigenOptions) { o.IndexBits = 5 })},
		"options.infinigen.predictor is 11": {Policy: Infinigen, Infinigen: infinigen(func(o *InfinigenOptions) { o.Predictor = 11 })},
	} {
		_, err := model.Estimate(wrong, 1)
		wantError(t, err, ErrInvalidArgument, text)
		_, err = model.NewSession(wrong)
		wantError(t, err, ErrInvalidArgument, text)
	}
}

func TestLogitsAndCounters(t *testing.T) {
	session := testSession(t, testModel(t))
	wantError(t, session.Logits(make([]float32, testVocabulary)), ErrInvalidArgument, "no logits")
	want, got := make([]float32, testVocabulary), make([]float32, testVocabulary)
	check(t, session.Prefill(background, testPrompt, nil))
	check(t, session.Decode(background, 9, want))
	check(t, session.Logits(got))
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("logit %d is %v, not %v", i, got[i], want[i])
		}
	}
	wantError(t, session.Logits(nil), ErrInvalidArgument, "logits is NULL")
	statistics := must(session.Statistics())(t)
	if statistics.KVAttended != statistics.KVHeld || statistics.KVMisses != 0 || statistics.KVEvicted != 0 {
		t.Errorf("statistics %+v", statistics)
	}
}

func TestCalibrationOptions(t *testing.T) {
	for text, wrong := range map[string]*ModelOptions{
		"options.calibration_text": {CalibrationText: "\xff"},
		"NUL":                      {SpeculationCachePath: "a\x00b"},
	} {
		_, err := Load(testModelPath(t), wrong)
		wantError(t, err, ErrInvalidArgument, text)
	}
	model := testModel(t)
	check(t, model.Close())
	wantError(t, model.Calibrate(func(float32) error { return nil }), ErrInvalidArgument, "closed")
}
