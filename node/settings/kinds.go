package settings

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// units of sizes, the largest first, as powers of 1024.
var units = [...]string{"TiB", "GiB", "MiB", "KiB"}

// Bytes takes a size between least and most, written as 4MiB, 1.5 GiB or plain
// bytes; 0 is taken too when zero says so, for "no limit".
func Bytes(least, most int64, zero bool) Kind[int64] {
	return Kind[int64]{Parse: func(text string) (int64, error) {
		n, err := ParseBytes(text)
		if err != nil || n == 0 && zero {
			return n, err
		}
		if n < least || n > most {
			also := ""
			if zero {
				also = ", or 0"
			}
			return 0, fmt.Errorf("it must be between %s and %s%s", FormatBytes(least), FormatBytes(most), also)
		}
		return n, nil
	}}
}

// ParseBytes reads a size: a number with one of B, KiB, MiB, GiB and TiB behind
// it, or of bytes when there is none.
func ParseBytes(text string) (int64, error) {
	number, factor := strings.TrimSpace(strings.TrimSuffix(text, "B")), 1.0
	for i, unit := range units {
		if before, ok := strings.CutSuffix(text, unit); ok {
			number, factor = strings.TrimSpace(before), math.Pow(1024, float64(len(units)-i))
			break
		}
	}
	n, err := strconv.ParseFloat(number, 64)
	if err != nil || !(n >= 0) || n*factor > 1<<62 || strings.Trim(number, "0123456789.") != "" {
		return 0, fmt.Errorf("a size is wanted, such as 512KiB, 4MiB, 1.5GiB or a number of bytes")
	}
	return int64(n * factor), nil
}

// FormatBytes writes a size in the largest unit that divides it.
func FormatBytes(n int64) string {
	for i, unit := range units {
		if size := int64(1) << (10 * (len(units) - i)); n > 0 && n%size == 0 {
			return strconv.FormatInt(n/size, 10) + unit
		}
	}
	return strconv.FormatInt(n, 10)
}

// Count takes a whole number between least and most.
func Count(least, most int) Kind[int] {
	return Kind[int]{Parse: func(text string) (int, error) {
		n, err := strconv.Atoi(text)
		if err != nil || n < least || n > most {
			return 0, fmt.Errorf("a whole number between %d and %d is wanted", least, most)
		}
		return n, nil
	}}
}

// Text takes what a check lets through.
func Text(check func(string) error) Kind[string] {
	return Kind[string]{Parse: func(text string) (string, error) { return text, check(text) }}
}

// Pairs takes a list KEY=VALUE,KEY=VALUE whose pairs pass a check and whose keys
// are all different; an empty text is an empty list.
func Pairs(check func(key, value string) error) Kind[map[string]string] {
	return Kind[map[string]string]{Parse: func(text string) (map[string]string, error) {
		pairs := map[string]string{}
		for item := range strings.SplitSeq(text, ",") {
			item = strings.TrimSpace(item)
			if item == "" && strings.TrimSpace(text) == "" {
				break
			}
			key, value, ok := strings.Cut(item, "=")
			key, value = strings.TrimSpace(key), strings.TrimSpace(value)
			if !ok || key == "" {
				return nil, fmt.Errorf("%.80q is not of the form KEY=VALUE; separate several by commas", item)
			}
			if _, twice := pairs[key]; twice {
				return nil, fmt.Errorf("%s is there twice", key)
			}
			if err := check(key, value); err != nil {
				return nil, err
			}
			pairs[key] = value
		}
		return pairs, nil
	}}
}
