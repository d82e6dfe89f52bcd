package main

import (
	"encoding/xml"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Sizes in pixels, and a line's limit: a README is about as wide.
const (
	columns    = 96
	charWidth  = 8.5 // of a font of 14 pixels, the widest of those named below
	lineHeight = 20
	margin     = 16
	bar        = 32 // with the window's title
)

// When a line appears, in seconds: a command after a pause, what it prints soon after it.
const (
	pause  = 0.9
	answer = 0.3
)

// The colours are those of the reader's own, light or dark. A reader that knows no animation sees all lines at once.
const style = `
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace;fill:#24292f}
.w{fill:#fff;stroke:#d0d7de}
.b{fill:#eef1f4}
.d{fill:#c3cad1}
.t,.p{fill:#57606a}
.c{fill:#0550ae;font-weight:600}
@media(prefers-color-scheme:dark){
text{fill:#d4dae1}
.w{fill:#0d1117;stroke:#3d444d}
.b{fill:#1c2128}
.d{fill:#484f58}
.t,.p{fill:#9198a1}
.c{fill:#79c0ff}
}
@media(prefers-reduced-motion:no-preference){.l{animation:show .2s backwards}}
@keyframes show{from{opacity:0}}
`

// draw is the picture of a session: each line is a text element of class l.
func draw(steps []step) (string, error) {
	var lines strings.Builder
	y, at := bar+margin+lineHeight/2, 0.0
	line := func(plain, marked string) error {
		if n := utf8.RuneCountInString(plain); n > columns {
			return fmt.Errorf("a line has %d characters, more than the %d of the window: %s", n, columns, plain)
		}
		for _, c := range plain {
			if c < ' ' {
				return fmt.Errorf("a line with the character %q, which a picture cannot show: %q", c, plain)
			}
		}
		fmt.Fprintf(&lines, "<text class=\"l\" x=\"%d\" y=\"%d\" style=\"animation-delay:%.1fs\">%s</text>\n", margin, y, at, marked)
		y += lineHeight
		return nil
	}
	for _, s := range steps {
		at += pause
		command := `<tspan class="p"># </tspan><tspan class="c">` + escape(s.command) + `</tspan>`
		if err := line("# "+s.command, command); err != nil {
			return "", err
		}
		at += answer
		for _, l := range strings.Split(strings.TrimSuffix(s.output, "\n"), "\n") {
			if s.output == "" {
				break
			}
			l = strings.TrimRight(l, " ")
			if err := line(l, escape(l)); err != nil {
				return "", err
			}
		}
	}
	width, height := 2*margin+int(columns*charWidth), y-lineHeight/2+margin/2
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" xml:space="preserve">`, width, height)
	fmt.Fprintf(&b, "\n<!-- made by tests/picture: make picture -->\n<title>A session of ublk-blksnap</title>\n<style>%s</style>\n", style)
	fmt.Fprintf(&b, "<rect class=\"w\" x=\".5\" y=\".5\" width=\"%d\" height=\"%d\" rx=\"8\"/>\n", width-1, height-1)
	fmt.Fprintf(&b, "<path class=\"b\" d=\"M1 %dV8.5a7.5 7.5 0 0 1 7.5-7.5H%.1fa7.5 7.5 0 0 1 7.5 7.5V%[1]dz\"/>\n", bar, float64(width)-8.5)
	for i := range 3 {
		fmt.Fprintf(&b, "<circle class=\"d\" cx=\"%d\" cy=\"%d\" r=\"6\"/>\n", margin+6+20*i, bar/2)
	}
	fmt.Fprintf(&b, "<text class=\"t\" x=\"%d\" y=\"%d\" text-anchor=\"middle\">ublk-blksnap</text>\n", width/2, bar/2+5)
	b.WriteString(lines.String() + "</svg>\n")
	return b.String(), nil
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}
