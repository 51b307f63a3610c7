package rest

import (
	"fmt"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// MaxPageSize is the most items that a page holds.
const MaxPageSize = 100

// Paging is embedded by the input of an operation that answers a Page. Asking
// for more than MaxPageSize is an error; a page_size of 0, with which Harbor's
// clients ask for everything, gives the largest page.
type Paging struct {
	Page     int `query:"page" min:"0" default:"1"`
	PageSize int `query:"page_size" min:"0" max:"100" default:"10"`
}

// Window gives how many items to skip and how many to show.
func (p Paging) Window() (skip, limit int) {
	limit = p.PageSize
	if limit <= 0 || limit > MaxPageSize {
		limit = MaxPageSize
	}
	number := max(p.Page, 1)
	if number > math.MaxInt32/MaxPageSize { // no listing is that long; and no overflow
		return math.MaxInt32, limit
	}
	return (number - 1) * limit, limit
}

// Page answers one page of a listing: the items as a JSON array, the number of
// all that match in X-Total-Count, and the neighbouring pages in Link.
type Page[T any] struct {
	Items []T
	Total int
}

// PageOf cuts the page that was asked for out of a whole listing.
func PageOf[T any](all []T, p Paging) Page[T] {
	skip, limit := p.Window()
	skip = min(skip, len(all))
	return Page[T]{Items: all[skip:min(skip+limit, len(all))], Total: len(all)}
}

type pager interface {
	page(h http.Header, r *http.Request) any
}

func (p Page[T]) page(h http.Header, r *http.Request) any {
	h.Set("X-Total-Count", strconv.Itoa(p.Total))
	query := r.URL.Query()
	number, _ := strconv.Atoi(query.Get("page")) // it was validated before
	size, err := strconv.Atoi(query.Get("page_size"))
	if err != nil {
		size = 10
	}
	skip, limit := Paging{number, size}.Window()
	number = max(number, 1)
	var links []string
	if number > 1 && skip-limit < p.Total {
		links = append(links, link(r.URL, query, number-1, limit, "prev"))
	}
	if skip+limit < p.Total {
		links = append(links, link(r.URL, query, number+1, limit, "next"))
	}
	if links != nil {
		h.Set("Link", strings.Join(links, " , "))
	}
	if p.Items == nil {
		return []T{}
	}
	return p.Items
}

// link is a path without scheme and host: a replicating Harbor puts its own in
// front.
func link(u *url.URL, query url.Values, page, size int, rel string) string {
	var b strings.Builder
	b.WriteString(u.EscapedPath())
	keys := make([]string, 0, len(query)+2)
	for key := range query {
		if key != "page" && key != "page_size" {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	fmt.Fprintf(&b, "?page=%d&page_size=%d", page, size)
	for _, key := range keys {
		for _, value := range query[key] {
			b.WriteString("&" + escapeLight(key) + "=" + escapeLight(value))
		}
	}
	return fmt.Sprintf("<%s>; rel=%q", b.String(), rel)
}

// escapeLight escapes what would break a Link header or change the query's
// meaning, and leaves the query language readable, as Harbor does.
func escapeLight(s string) string {
	const plain = "-_.~!$'()*,:@/[]{}="
	var b strings.Builder
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte(plain, c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
