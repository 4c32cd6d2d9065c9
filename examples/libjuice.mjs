// What node-datachannel's agents need to know of libdatachannel and libjuice, its DTLS and ICE.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'

/**
 * Keeps the library's threads on one core and lets one that is woken wait until its waker is done (Linux's SCHED_BATCH; neither
 * wants a privilege). Call it before the first connection. A ClientHello that comes before there is a path is kept, but
 * libdatachannel (0.24.5) wakes the thread that shall read it while it still begins DTLS itself. If that one runs at once, the
 * packet is read with the next, which the other side sends a second later; if both run side by side, each may wait for what the
 * other holds, for good (mended after 0.24.5). Elsewhere, or without `taskset` and `chrt`, that is what may happen.
 */
export function finishBeforeYielding() {
  if (process.platform !== 'linux') return
  const pid = String(process.pid)
  spawnSync('taskset', ['--all-tasks', '--cpu-list', '--pid', currentCore(), pid])
  spawnSync('chrt', ['--all-tasks', '--batch', '--pid', '0', pid])
}

/** The core that this process runs on: it may, and the kernel had a reason. */
function currentCore() {
  const stat = readFileSync('/proc/self/stat', 'utf8')
  return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[36]
}

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
