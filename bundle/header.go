package bundle

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// Tar, POSIX.1-1988 "ustar", in the one form that this format has. Every field
// is fixed by path and size, so a reader compares instead of interpreting.

const (
	blockSize = 512
	// maxUSTAR is the largest size that eleven octal digits hold: 8 GiB - 1.
	maxUSTAR  = 1<<33 - 1
	maxName   = 100 // bytes of the name field
	maxPrefix = 155 // bytes of the prefix field
)

// padding is the number of zero bytes after a file of the size.
func padding(size int64) int64 { return -size & (blockSize - 1) }

// header gives the bytes before the content of a file: one ustar block, and
// before it a PAX extended header when the file has above 8 GiB - 1 or a path
// whose last element has above 100 bytes. That header holds what does not fit
// and nothing else.
func header(path string, size int64) ([]byte, error) {
	records, about := "", "size"
	if len(path)-strings.LastIndexByte(path, '/')-1 > maxName {
		records, about = paxRecord("path", path), "path"
	}
	inBlock := size
	if size > maxUSTAR {
		records += paxRecord("size", strconv.FormatInt(size, 10))
		inBlock = 0
	}
	main, err := block(path, inBlock, '0')
	if err != nil || records == "" {
		return main, err
	}
	extended, err := block("PaxHeaders.0/"+about, int64(len(records)), 'x')
	if err != nil {
		return nil, err
	}
	extended = append(extended, records...)
	extended = append(extended, make([]byte, padding(int64(len(records))))...)
	return append(extended, main...), nil
}

// paxRecord is "LENGTH key=value\n", where LENGTH counts the whole record.
func paxRecord(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	n := len(rest)
	for n != len(rest)+len(strconv.Itoa(n)) {
		n = len(rest) + len(strconv.Itoa(n))
	}
	return strconv.Itoa(n) + rest
}

func block(path string, size int64, kind byte) ([]byte, error) {
	prefix, name := "", path
	if len(path) > maxName {
		// The split is at the last slash. A last element that is still too long is
		// cut; the PAX header has the path.
		cut := strings.LastIndexByte(path, '/')
		if cut < 0 || cut > maxPrefix {
			return nil, fmt.Errorf("path %q does not fit a tar header", path)
		}
		prefix, name = path[:cut], path[cut+1:]
		name = name[:min(len(name), maxName)]
	}
	b := make([]byte, blockSize)
	copy(b[0:], name)
	copy(b[100:], "0000644\x00")                  // mode
	copy(b[108:], "0000000\x00")                  // uid
	copy(b[116:], "0000000\x00")                  // gid
	copy(b[124:], fmt.Sprintf("%011o\x00", size)) // size
	copy(b[136:], "00000000000\x00")              // mtime
	copy(b[148:], "        ")                     // checksum, counted as spaces
	b[156] = kind                                 // type
	copy(b[257:], "ustar\x0000")                  // magic and version
	copy(b[329:], "0000000\x00")                  // devmajor
	copy(b[337:], "0000000\x00")                  // devminor
	copy(b[345:], prefix)                         //
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b, nil
}

// statedSize reads the size field of a ustar block. Only the files whose size
// nothing else tells are read this way; the whole block is then compared with
// the one that this size gives.
func statedSize(b []byte) (int64, bool) {
	digits, ok := bytes.CutSuffix(b[124:136], []byte{0})
	if !ok {
		return 0, false
	}
	size, err := strconv.ParseInt(string(digits), 8, 64)
	return size, err == nil && size >= 0
}

// statedPath reads the path of a ustar block, for error messages.
func statedPath(b []byte) string {
	text := func(field []byte) string {
		s, _, _ := bytes.Cut(field, []byte{0})
		return string(s)
	}
	path := text(b[0:100])
	if prefix := text(b[345:500]); prefix != "" {
		path = prefix + "/" + path
	}
	return path
}
