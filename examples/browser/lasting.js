// An agent in a browser whose call lasts: it survives a NAT that forgets, another network, and a server that starts anew.
//
// Signaling comes back by itself, to the same session where there still is one. When the path is gone, or the credentials
// of the relay are, ICE starts again over the same connection (perfect negotiation; who yields in a glare is in the offer).
// The channel stays, and nothing that was sent on it is lost. To show that, both sides number what they say.
// Parameters in the fragment: url, token, to (who to call), seconds (how long to talk), restart_every (seconds after which who
// called gathers anew, with the credentials that came last).
const flags = Object.fromEntries(new URLSearchParams(location.hash.slice(1)))
const { url = location.origin, token, to } = flags
const MILLISECONDS = { between: 50, ping: 3_000, dead: 8_000, again: 1_000, mend: 4_000, disconnected: 2_000 }
const STOP = new Set([4001, 4002, 4005]) // expired, revoked, replaced

let socket, session, seq = 0, heard = 0, reconnectIn = 0
let peer, connection, channel, making = false, polite = true
const said = { number: 0, over: false }
const seen = { next: 0, inOrder: true, last: 0, silence: 0, over: false, done: false }
const story = { restarts: 0, resumed: [], refreshed: 0 }

connectSignaling()
setInterval(watchSignaling, MILLISECONDS.ping)
setInterval(watchPath, MILLISECONDS.mend)

function connectSignaling() {
  const own = (socket = new WebSocket(new URL('/v1/ws', url).href.replace(/^http/, 'ws'), ['halfway.v1', `bearer.${token}`]))
  heard = Date.now()
  const resume = session && { session, after: seq }
  socket.onopen = () => signal({ type: 'hello', card: { name: 'lasting' }, ...(resume && { resume }) })
  let handled = Promise.resolve()
  socket.onmessage = ({ data }) => {
    heard = Date.now()
    handled = handled.then(() => own === socket && receive(JSON.parse(data))).catch((error) => show('NOTE', error.message))
  }
  socket.onclose = ({ code }) => own === socket && lost(code)
}

function lost(code) {
  socket = undefined
  if (STOP.has(code)) return show('ERROR', `signaling ended (${code})`)
  setTimeout(connectSignaling, reconnectIn || MILLISECONDS.again)
  reconnectIn = 0
}

/** A network that is gone closes no connection: it only falls silent. */
function watchSignaling() {
  if (socket?.readyState === WebSocket.OPEN) signal({ type: 'ping' })
  if (!socket || Date.now() - heard < MILLISECONDS.dead) return
  socket.close()
  lost()
}

async function receive(frame) {
  if (frame.type === 'error') show('NOTE', `${frame.code}: ${frame.message}`)
  if (frame.seq) {
    seq = frame.seq
    signal({ type: 'received', upTo: seq })
  }
  if (frame.type === 'welcome') return welcome(frame)
  if (frame.type === 'ice') return refresh(frame)
  if (frame.type === 'restarting') return void (reconnectIn = frame.reconnectIn * 1_000)
  if (frame.type === 'agentJoined' && frame.agent === to && !connection) connect(to)
  if (frame.type === 'offer' && !connection) connect(frame.from)
  if (!connection || frame.from !== peer) return
  if (frame.type === 'offer' || frame.type === 'answer') await describe(frame)
  // What belongs to an offer that was ignored, or to an earlier one, is of no use any more.
  if (frame.type === 'iceCandidate') await connection.addIceCandidate(frame.candidate).catch(() => {})
}

function welcome({ resumed, session: own, ice, agents }) {
  if (session) story.resumed.push(resumed)
  session = own
  if (!resumed) seq = 0
  window.ice = ice
  connection?.setConfiguration(ice)
  // Without the old session there may be none of its allocations either.
  if (connection && !resumed) mend({ anew: true })
  if (to && !connection && agents.some(({ agent }) => agent === to)) connect(to)
}

/** Who is not connected yet will be by these. */
function refresh(ice) {
  story.refreshed++
  window.ice = ice
  connection?.setConfiguration(ice)
}

function connect(agent) {
  peer = agent
  connection = new RTCPeerConnection(window.ice)
  connection.onicecandidate = ({ candidate }) => signal({ type: 'iceCandidate', to: peer, candidate })
  connection.onnegotiationneeded = offer
  connection.onconnectionstatechange = () => {
    if (connection.connectionState !== 'disconnected') return
    setTimeout(() => connection.connectionState === 'disconnected' && mend(), MILLISECONDS.disconnected)
  }
  connection.ondatachannel = ({ channel }) => talk(channel)
  if (to) talk(connection.createDataChannel('talk'))
}

async function offer() {
  try {
    making = true
    await connection.setLocalDescription()
    signal({ type: 'offer', to: peer, sdp: connection.localDescription.sdp })
  } finally {
    making = false
  }
}

async function describe({ type, sdp, polite: yields }) {
  if (type === 'answer' && connection.signalingState !== 'have-local-offer') return
  if (type === 'offer') {
    polite = yields
    if (!polite && (making || connection.signalingState !== 'stable')) return
  }
  await connection.setRemoteDescription({ type, sdp })
  if (type === 'answer') return
  await connection.setLocalDescription()
  signal({ type: 'answer', to: peer, sdp: connection.localDescription.sdp })
}

/** As long as there is no path, one is looked for: an offer may have been lost, too. */
function watchPath() {
  if (connection && !seen.done && ['disconnected', 'failed'].includes(connection.connectionState)) mend()
}

/** Who called looks for another path; two who do so at once would only undo each other's work. */
async function mend({ anew = false } = {}) {
  if (!to || making || socket?.readyState !== WebSocket.OPEN) return
  const waits = connection.signalingState === 'have-local-offer'
  // The same offer again: an answer to either is as good. But of old credentials nothing comes any more.
  if (waits && !anew) return signal({ type: 'offer', to: peer, sdp: connection.localDescription.sdp })
  if (waits) await connection.setLocalDescription({ type: 'rollback' })
  story.restarts++
  connection.restartIce()
}

function talk(opened) {
  channel = opened
  channel.onmessage = ({ data }) => hear(JSON.parse(data))
  channel.onopen = async () => {
    show('OPEN', '')
    if (flags.restart_every) setInterval(() => seen.done || mend({ anew: true }), flags.restart_every * 1_000)
    const until = Date.now() + flags.seconds * 1_000
    while (Date.now() < until) {
      channel.send(JSON.stringify({ number: said.number++ }))
      await new Promise((resolve) => setTimeout(resolve, MILLISECONDS.between))
    }
    channel.send(JSON.stringify({ over: said.number }))
    said.over = true
    conclude()
  }
}

function hear({ number, over, done }) {
  const now = Date.now()
  if (seen.last) seen.silence = Math.max(seen.silence, now - seen.last)
  seen.last = now
  if (number !== undefined) seen.inOrder &&= number === seen.next++
  if (over !== undefined) seen.over = over
  if (done) seen.done = true
  conclude()
}

let concluded = false
async function conclude() {
  if (!said.over || seen.over === false) return
  if (!concluded) channel.send(JSON.stringify({ done: true }))
  concluded = true
  if (!seen.done) return
  const path = await candidateTypes()
  show('RESULT', JSON.stringify({ sent: said.number, received: seen.next, announced: seen.over, in_order: seen.inOrder, silence_ms: seen.silence, ...story, path }))
}

async function candidateTypes() {
  const stats = await connection.getStats()
  const transport = [...stats.values()].find(({ type }) => type === 'transport')
  const pair = stats.get(transport.selectedCandidatePairId)
  return [pair.localCandidateId, pair.remoteCandidateId].map((id) => stats.get(id).candidateType)
}

function signal(frame) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(frame))
}

function show(what, text) {
  console.log(`${what} ${text}`)
  document.getElementById('log').append(`${what} ${text}\n`)
}
