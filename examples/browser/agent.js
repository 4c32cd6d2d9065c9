// An agent in a browser. Told only Halfway's URL and a token, it opens a data channel to another agent. The parameters of
// the other examples' command line come in the fragment, which no server sees; the result goes to the page, to the
// console and to `window.result`.
import { Inbox, sendAll } from './exchange.mjs'

const flags = Object.fromEntries(new URLSearchParams(location.hash.slice(1)))
const { url = location.origin, token, to, channel: kind = 'ordered' } = flags
const [messages, size, blob] = [flags.messages ?? 10, flags.size ?? 1024, flags.blob ?? 0].map(Number)
const reliability = { ordered: {}, unordered: { ordered: false }, lossy: { ordered: false, maxRetransmits: 0 } }
const HIGH_WATER = 256 * 1024

const inbox = new Inbox()
let socket, ice, peer, connection, offered, release
const released = new Promise((resolve) => (release = resolve))
let settle
window.result = new Promise((resolve, reject) => (settle = { resolve, reject }))

start().catch(fail)

async function start() {
  const response = await fetch(new URL('/v1/ice', url), { headers: { authorization: `Bearer ${token}` } })
  if (!response.ok) throw new Error(`GET /v1/ice: ${response.status} ${await response.text()}`)
  ice = only(flags.turn_transport, await response.json())
  if ('relay_only' in flags) ice.iceTransportPolicy = 'relay'

  // A browser's WebSocket sends no Authorization header: the token is offered as a subprotocol.
  socket = new WebSocket(new URL('/v1/ws', url).href.replace(/^http/, 'ws'), ['halfway.v1', `bearer.${token}`])
  let handled = Promise.resolve()
  socket.onopen = () => signal({ type: 'hello', card: { name: 'browser' } })
  socket.onmessage = ({ data }) => (handled = handled.then(() => receive(JSON.parse(data))).catch(fail))
  socket.onclose = ({ code }) => fail(new Error(`signaling closed (${code})`))
}

/** Of the relay's URLs those of one transport, for who does not leave the choice to the browser. */
function only(transport, list) {
  const wanted = { udp: /^turn:.*=udp$/, tcp: /^turn:.*=tcp$/, tls: /^turns:/ }[transport]
  if (!wanted) return list
  const kept = list.iceServers.map((server) => ({ ...server, urls: server.urls.filter((url) => wanted.test(url)) }))
  return { ...list, iceServers: kept.filter(({ urls }) => urls.length) }
}

async function receive(frame) {
  if (frame.type === 'welcome' && frame.agents.some(({ agent }) => agent === to)) await call(to)
  if (frame.type === 'agentJoined' && frame.agent === to && !peer) await call(to)
  if (frame.type === 'error') throw new Error(`${frame.code}: ${frame.message}`)
  if (frame.type === 'offer' && !peer) connect(frame.from)
  if (!peer || frame.from !== peer) return
  if (frame.type === 'offer') await answer(frame.sdp)
  if (frame.type === 'answer') await connection.setRemoteDescription({ type: 'answer', sdp: frame.sdp })
  if (frame.type === 'iceCandidate') await connection.addIceCandidate(frame.candidate)
  if (frame.type === 'message') inbox.announce(frame.payload)
  if (frame.type === 'bye') release()
}

async function call(agent) {
  connect(agent)
  talk(connection.createDataChannel(kind, reliability[kind]))
  await describe()
}

async function answer(sdp) {
  await connection.setRemoteDescription({ type: 'offer', sdp })
  await describe()
}

async function describe() {
  await connection.setLocalDescription()
  const { type, sdp } = connection.localDescription
  signal({ type, to: peer, sdp })
}

function connect(agent) {
  peer = agent
  offered = performance.now()
  connection = new RTCPeerConnection(ice)
  connection.onicecandidate = ({ candidate }) => {
    // Firefox says twice that there are no more: by an empty candidate, which other libraries do not take, and by null.
    if (candidate?.candidate !== '') signal({ type: 'iceCandidate', to: peer, candidate })
  }
  connection.onconnectionstatechange = () => {
    if (connection.connectionState === 'failed') fail(new Error('no path to the other agent'))
  }
  connection.ondatachannel = ({ channel }) => talk(channel)
}

async function talk(channel) {
  // Created here or announced by the other agent, the channel bears the name of its kind.
  inbox.lossy = channel.label === 'lossy'
  channel.binaryType = 'arraybuffer'
  channel.onmessage = ({ data }) => inbox.take(data)
  if (channel.readyState !== 'open') await new Promise((resolve) => (channel.onopen = resolve))
  const opened_ms = Math.round(performance.now() - offered)
  // What is said while a channel opens may be lost (examples/README.md): who answers speaks when something has come.
  if (!to) await inbox.begun
  await sendAll(writer(channel), { messages, size, blob, lossy: inbox.lossy })
  signal({ type: 'message', to: peer, payload: { messages, blob } })
  await inbox.complete
  const types = await candidateTypes()
  signal({ type: 'bye', to: peer })
  await released
  await finish({ opened_ms, ...inbox.summary, ...types })
}

/** Sends on a channel, and waits while it holds more than the network takes. */
function writer(channel) {
  channel.bufferedAmountLowThreshold = HIGH_WATER / 2
  return async (data) => {
    channel.send(data)
    if (channel.bufferedAmount > HIGH_WATER) await new Promise((resolve) => (channel.onbufferedamountlow = resolve))
  }
}

async function candidateTypes() {
  const stats = await connection.getStats()
  const all = [...stats.values()]
  // Firefox has no statistics of the transport, and marks the pair instead.
  const chosen = all.find(({ type }) => type === 'transport')?.selectedCandidatePairId
  const pair = chosen ? stats.get(chosen) : all.find(({ type, selected }) => type === 'candidate-pair' && selected)
  const [local, remote] = [pair?.localCandidateId, pair?.remoteCandidateId].map((id) => stats.get(id)?.candidateType)
  return { local, remote }
}

function signal(frame) {
  socket.send(JSON.stringify(frame))
}

function fail(error) {
  show('ERROR', error.message)
  settle.reject(error)
  close()
}

async function finish(result) {
  // What was sent is out once the socket has closed; who reads the result may end the browser at once.
  const closed = new Promise((resolve) => (socket.onclose = resolve))
  socket.close()
  await closed
  show('RESULT', JSON.stringify(result))
  settle.resolve(result)
  close()
}

function show(what, text) {
  console.log(`${what} ${text}`)
  document.getElementById('log').append(`${what} ${text}\n`)
}

function close() {
  if (socket) socket.onclose = null
  socket?.close()
  connection?.close()
}
