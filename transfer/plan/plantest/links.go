package plantest

// crossing counts the flows into a site; those that share its link change their rate.
func (s *sim) crossing(from, to *simNode, by int) {
	if from.Site == to.Site || s.f.WAN == 0 {
		return
	}
	s.cross[to.Site] += by
	for _, o := range s.nodes {
		if o == from || !o.alive {
			continue
		}
		for _, f := range o.flows {
			if s.nodes[f.to].Site == to.Site && o.Site != to.Site {
				s.advance(o)
				s.reschedule(o)
				break
			}
		}
	}
}

// touchSenders recomputes all who send to m but one.
func (s *sim) touchSenders(m, but *simNode) {
	for _, p := range m.peers {
		o := s.nodes[p]
		if o == but || !o.alive || m.Down >= o.Up*float64(m.in+1) {
			continue
		}
		for _, f := range o.flows {
			if f.to == m.id {
				s.advance(o)
				s.reschedule(o)
				break
			}
		}
	}
}

// advance brings a node's flows up to date.
func (s *sim) advance(n *simNode) {
	dt := s.now - n.last
	n.last = s.now
	if dt <= 0 {
		return
	}
	for i := range n.flows {
		b := n.flows[i].rate * dt
		n.flows[i].left -= b
		n.sent += b
		if s.nodes[n.flows[i].to].Site != n.Site {
			s.crossed[s.nodes[n.flows[i].to].Site] += b
		}
	}
}

// reschedule shares the uplink and schedules the next end of a piece.
func (s *sim) reschedule(n *simNode) {
	n.version++
	if len(n.flows) == 0 {
		return
	}
	left, open := n.Up, len(n.flows)
	for i := range n.flows {
		n.flows[i].rate = -1
	}
	for open > 0 {
		share := left / float64(open)
		fixed := false
		for i := range n.flows {
			f := &n.flows[i]
			if f.rate >= 0 {
				continue
			}
			m := s.nodes[f.to]
			cap := m.Down / float64(m.in)
			if s.f.WAN > 0 && m.Site != n.Site {
				cap = min(cap, s.f.WAN/float64(s.cross[m.Site]))
			}
			if cap < share {
				f.rate = cap
				left -= cap
				open--
				fixed = true
				break
			}
		}
		if !fixed {
			for i := range n.flows {
				if n.flows[i].rate < 0 {
					n.flows[i].rate = share
				}
			}
			break
		}
	}
	next := 1e18
	for _, f := range n.flows {
		next = min(next, f.left/f.rate)
	}
	s.push(event{at: s.now + max(0, next), kind: evDone, a: int32(n.id), x: n.version})
}
