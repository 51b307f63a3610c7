package main

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// traced are the system calls that can change a directory, the ones that say
// which file a descriptor is, and those with which bytes could get past us, so
// that they are found.
const traced = "execve,openat,close,dup,dup2,dup3,fcntl,lseek," +
	"write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,splice,mmap," +
	"ftruncate,truncate,fallocate,fsync,fdatasync,sync,syncfs," +
	"rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat"

// call is a system call of a trace: strings are decoded, all else is as strace
// writes it.
type call struct {
	name   string
	args   []string
	result int64
	failed bool
	begun  bool // it has only begun: its end follows as a call of its own
	thread string
}

// readTrace gives every call twice, where it begins and where it ends: a sync
// covers what ended before it began, and holds when it has ended.
func readTrace(name string, visit func(call) error) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<20)
	open := map[string]string{}
	for number := 1; ; number++ {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) && line == "" {
			return nil
		} else if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if err := readLine(strings.TrimSuffix(line, "\n"), open, visit); err != nil {
			return fmt.Errorf("line %d of the trace: %w", number, err)
		}
	}
}

func readLine(line string, open map[string]string, visit func(call) error) error {
	thread, text, _ := strings.Cut(line, " ")
	text = strings.TrimLeft(text, " ")
	if strings.HasPrefix(text, "---") || strings.HasPrefix(text, "+++") {
		return nil
	}
	if head, ok := strings.CutSuffix(text, " <unfinished ...>"); ok {
		open[thread] = head
		c, err := parse(head, thread)
		if err != nil {
			return err
		}
		c.begun = true
		return visit(c)
	}
	began := false
	if rest, ok := strings.CutPrefix(text, "<... "); ok {
		_, rest, ok = strings.Cut(rest, " resumed>")
		if !ok || open[thread] == "" {
			return fmt.Errorf("the end of a call that did not begin: %.80s", text)
		}
		text, began = open[thread]+rest, true
		delete(open, thread)
	}
	c, err := parse(text, thread)
	if err != nil {
		return err
	}
	if !began {
		start := c
		start.begun = true
		if err := visit(start); err != nil {
			return err
		}
	}
	return visit(c)
}

// parse reads NAME(ARG, ARG...) = RESULT, or the part of it that there is yet.
func parse(text, thread string) (call, error) {
	c := call{thread: thread, failed: true}
	var rest string
	var ok bool
	if c.name, rest, ok = strings.Cut(text, "("); !ok {
		return c, fmt.Errorf("no call: %.80s", text)
	}
	for depth, from, at := 0, 0, 0; ; at++ {
		if at == len(rest) { // not finished
			c.args = append(c.args, strings.TrimSpace(rest[from:]))
			break
		}
		switch rest[at] {
		case '"':
			at += 1 + strings.IndexByte(rest[at+1:], '"') // all in it is \x..
			continue
		case '(', '[', '{':
			depth++
			continue
		case ']', '}':
			depth--
			continue
		case ')':
			if depth > 0 {
				depth--
				continue
			}
		case ',':
			if depth == 0 {
				c.args = append(c.args, strings.TrimSpace(rest[from:at]))
				from = at + 1
			}
			continue
		default:
			continue
		}
		c.args = append(c.args, strings.TrimSpace(rest[from:at]))
		_, result, _ := strings.Cut(rest[at:], "= ")
		result, _, _ = strings.Cut(result, " ")
		n, err := strconv.ParseInt(result, 0, 64)
		c.result, c.failed = n, err != nil || n < 0
		break
	}
	for i, a := range c.args {
		if !strings.HasPrefix(a, `"`) {
			continue
		}
		if strings.HasSuffix(a, "...") {
			return c, fmt.Errorf("%s: strace cut a string short", c.name)
		}
		b, err := hex.DecodeString(strings.ReplaceAll(strings.Trim(a, `"`), `\x`, ""))
		if err != nil {
			return c, fmt.Errorf("%s: %w", c.name, err)
		}
		c.args[i] = string(b)
	}
	return c, nil
}

func (c call) number(i int) int64 {
	n, _ := strconv.ParseInt(c.args[i], 0, 64)
	return n
}

// player does to a disk what the calls of one process did to a directory.
type player struct {
	disk  *disk
	root  string // of the directory
	files map[int64]*handle
	marks map[string]int // of the syncs under way, by thread
	run   bool           // the process has been executed
	// moved is called after each change of the disk or of what of it is durable,
	// answered with the beginning of an HTTP answer as soon as it is written.
	moved    func(call string) error
	answered func(head string) error
}

// handle is an open file of the directory.
type handle struct {
	file   *inode
	offset int64
	append bool
}

func newPlayer(d *disk, root string) *player {
	return &player{disk: d, root: root, files: map[int64]*handle{}, marks: map[string]int{}}
}

// find gives the place of a path that is arguments i and i+1 of the call;
// inside is false when it is not in the directory.
func (p *player) find(c call, i int) (parent *inode, key string, found *inode, inside bool) {
	path := c.args[i+1]
	if strings.HasPrefix(path, "/") {
		rest, ok := strings.CutPrefix(path, p.root)
		if !ok || rest != "" && rest[0] != '/' {
			return nil, "", nil, false
		}
		parent, key, found = p.disk.walk(p.disk.root, rest)
		return parent, key, found, true
	}
	h := p.files[c.number(i)]
	if c.args[i] == "AT_FDCWD" || h == nil {
		return nil, "", nil, false
	}
	parent, key, found = p.disk.walk(h.file, path)
	return parent, key, found, true
}

// play follows one call.
func (p *player) play(c call) error {
	var h *handle
	if len(c.args) > 0 {
		h = p.files[c.number(0)]
		if c.args[0] == "AT_FDCWD" {
			h = nil
		}
	}
	if c.begun {
		return p.begin(c, h)
	}
	if c.failed {
		return nil
	}
	switch c.name {
	case "openat":
		return p.open(c)
	case "dup", "dup2", "dup3":
		if h != nil {
			p.files[c.result] = h
		} else {
			delete(p.files, c.result)
		}
	case "fcntl":
		if h != nil && strings.HasPrefix(c.args[1], "F_DUPFD") {
			p.files[c.result] = h
		}
	case "lseek":
		if h != nil {
			h.offset = c.result
		}
	case "write", "pwrite64", "ftruncate", "fallocate", "fsync", "fdatasync":
		if h != nil {
			return p.bytes(c, h)
		}
	case "renameat", "renameat2", "linkat", "unlinkat", "mkdirat":
		return p.names(c)
	case "execve":
		if p.run {
			return errors.New("the process started another one, whose descriptors are not followed")
		}
		p.run = true
	case "mmap":
		if f := p.files[c.number(4)]; f != nil && f.file.names == nil && strings.Contains(c.args[2], "PROT_WRITE") && strings.Contains(c.args[3], "MAP_SHARED") {
			return errors.New("a file is written through memory, which a trace does not show")
		}
	case "close":
	default: // those that are not followed
		if out := slices.Index([]string{"", "", "copy_file_range", "splice"}, c.name); out > 0 {
			h = p.files[c.number(2)]
		}
		if h != nil || len(c.args) > 0 && strings.HasPrefix(c.args[0], p.root) {
			return fmt.Errorf("%s is not followed: add it", c.name)
		}
	}
	return nil
}

// begin is for the calls whose beginning matters.
func (p *player) begin(c call, h *handle) error {
	switch c.name {
	case "close":
		// The number is free before the call has returned.
		delete(p.files, c.number(0))
	case "fsync", "fdatasync":
		p.marks[c.thread] = p.disk.clock
	case "write":
		if h == nil && len(c.args) > 1 && strings.HasPrefix(c.args[1], "HTTP/1.1 ") {
			return p.answered(c.args[1])
		}
	}
	return nil
}

func (p *player) open(c call) error {
	parent, key, found, inside := p.find(c, 0)
	if !inside {
		delete(p.files, c.result)
		return nil
	}
	flags := strings.Split(c.args[2], "|")
	if slices.Contains(flags, "O_TMPFILE") {
		return errors.New("O_TMPFILE is not followed: add it")
	}
	made := false
	if found == nil {
		if parent == nil || !slices.Contains(flags, "O_CREAT") {
			return fmt.Errorf("opened %s, of which nothing is known", c.args[1])
		}
		found, made = &inode{}, true
		p.disk.set(name{parent, key, found})
	}
	p.files[c.result] = &handle{file: found, append: slices.Contains(flags, "O_APPEND")}
	if slices.Contains(flags, "O_TRUNC") && found.data.size > 0 {
		p.disk.resize(found, 0)
		made = true
	}
	if made {
		return p.moved(c.name)
	}
	return nil
}

func (p *player) bytes(c call, h *handle) error {
	switch c.name {
	case "write":
		if h.append {
			h.offset = h.file.data.size
		}
		p.disk.write(h.file, h.offset, []byte(c.args[1][:c.result]))
		h.offset += c.result
	case "pwrite64":
		p.disk.write(h.file, c.number(3), []byte(c.args[1][:c.result]))
	case "ftruncate":
		p.disk.resize(h.file, c.number(1))
	case "fallocate":
		end := c.number(2) + c.number(3)
		if c.args[1] != "0" || end <= h.file.data.size {
			return nil // it reserves, the bytes stay
		}
		p.disk.resize(h.file, end)
	default:
		p.disk.sync(h.file, p.marks[c.thread])
	}
	return p.moved(c.name)
}

func (p *player) names(c call) error {
	parent, key, found, inside := p.find(c, 0)
	if !inside {
		return nil
	}
	switch c.name {
	case "mkdirat":
		p.disk.set(name{parent, key, &inode{names: map[string]*inode{}}})
	case "unlinkat":
		if found == nil {
			return nil // a socket
		}
		p.disk.set(name{parent, key, nil})
	default:
		if found == nil {
			return fmt.Errorf("%s of %s, of which nothing is known", c.name, c.args[1])
		}
		if len(c.args) > 4 && c.args[4] != "0" && c.args[4] != "RENAME_NOREPLACE" {
			return fmt.Errorf("%s with %s is not followed: add it", c.name, c.args[4])
		}
		to, toKey, _, inside := p.find(c, 2)
		if !inside || to == nil {
			return fmt.Errorf("%s to %s, which is not in the directory", c.name, c.args[3])
		}
		sets := []name{{parent, key, nil}, {to, toKey, found}}
		if c.name == "linkat" {
			sets = sets[1:]
		}
		p.disk.set(sets...)
	}
	return p.moved(c.name)
}
