// What node-datachannel's agents need to know of libjuice, its ICE.

// libjuice has no relay-only mode (its policy hides candidates, but checks still leave from the host's own socket):
// an agent that neither tells nor hears of any but relayed candidates has no other path to find.
export function candidateFilter(relayOnly) {
  const mayUse = (candidate) => !relayOnly || / typ relay\b/.test(candidate)
  const keeps = (line) => !line.startsWith('a=candidate:') || mayUse(line)
  return { mayUse, allowed: (sdp) => sdp.split(/(?<=\n)/).filter(keeps).join('') }
}

/** The form that takes user and password as they are; libjuice knows TURN over UDP only, and needs no STUN beside it. */
export function nativeServers({ urls, username, credential }) {
  const turn = urls.map((url) => /^turn:([^?]+?)(?::(\d+))?(?:\?transport=udp)?$/.exec(url)).filter(Boolean)
  return turn.map(([, host, port = 3478]) => {
    const hostname = host.replace(/[[\]]/g, '')
    return { hostname, port: Number(port), username, password: credential, relayType: 'TurnUdp' }
  })
}
