#!/usr/bin/env node
// An agent on node-datachannel. Told only Halfway's URL and a token, it opens a data channel to another agent.
import { PeerConnection } from 'node-datachannel'
import WebSocket from 'ws'
import { commandLine, fetchIce, pairFlags } from '../cli.mjs'
import { Inbox, sendAll } from '../exchange.mjs'
import { candidateFilter, finishBeforeYielding, nativeServers } from '../libjuice.mjs'

const { url, tls, flags, relayOnly } = commandLine(pairFlags)
const { mayUse, allowed } = candidateFilter(relayOnly)
const [messages, size, blob] = [flags.messages, flags.size, flags.blob].map(Number)
const reliability = { ordered: {}, unordered: { unordered: true }, lossy: { unordered: true, maxRetransmits: 0 } }
const HIGH_WATER = 256 * 1024

finishBeforeYielding()
const ice = await fetchIce(url, tls)
const socket = new WebSocket(new URL('/v1/ws', url), 'halfway.v1', tls)
socket.on('open', () => signal({ type: 'hello', card: { name: 'node-datachannel' } }))
socket.on('message', (text) => {
  try {
    receive(JSON.parse(text))
  } catch (error) {
    fail(error)
  }
})
socket.on('error', fail)
socket.on('close', (code) => {
  if (process.exitCode === undefined) console.error(`signaling closed (${code})`)
  process.exit(process.exitCode ?? 1) // the library's threads would keep it running
})

const inbox = new Inbox()
let peer, connection, offered, release
const released = new Promise((resolve) => (release = resolve))

function receive(frame) {
  if (frame.type === 'welcome' && frame.agents.some(({ agent }) => agent === flags.to)) call(flags.to)
  if (frame.type === 'agentJoined' && frame.agent === flags.to && !peer) call(flags.to)
  if (frame.type === 'error') throw new Error(`${frame.code}: ${frame.message}`)
  if (frame.type === 'offer' && !peer) connect(frame.from)
  if (!peer || frame.from !== peer) return
  if (frame.type === 'offer' || frame.type === 'answer') connection.setRemoteDescription(allowed(frame.sdp), frame.type)
  if (frame.type === 'iceCandidate' && frame.candidate && mayUse(frame.candidate.candidate))
    connection.addRemoteCandidate(frame.candidate.candidate, frame.candidate.sdpMid)
  if (frame.type === 'message') inbox.announce(frame.payload)
  if (frame.type === 'bye') release()
}

function call(agent) {
  connect(agent)
  talk(connection.createDataChannel(flags.channel, reliability[flags.channel]))
}

function connect(agent) {
  peer = agent
  offered = Date.now()
  connection = new PeerConnection(agent, { iceServers: ice.iceServers.flatMap(nativeServers) })
  connection.onLocalDescription((sdp, type) => signal({ type, to: peer, sdp: allowed(sdp) }))
  connection.onLocalCandidate((candidate, sdpMid) => {
    if (mayUse(candidate)) signal({ type: 'iceCandidate', to: peer, candidate: { candidate, sdpMid, sdpMLineIndex: 0 } })
  })
  connection.onGatheringStateChange((state) => {
    if (state === 'complete') signal({ type: 'iceCandidate', to: peer, candidate: null })
  })
  connection.onStateChange((state) => state === 'failed' && fail(new Error('no path to the other agent')))
  connection.onDataChannel(talk)
}

async function talk(channel) {
  // Created here or announced by the other agent, the channel bears the name of its kind.
  inbox.lossy = channel.getLabel() === 'lossy'
  channel.onMessage((data) => inbox.take(data))
  await new Promise((resolve) => channel.onOpen(resolve))
  const opened_ms = Date.now() - offered
  const pair = connection.getSelectedCandidatePair()
  // What is said while a channel opens may be lost (examples/README.md): who answers speaks when something has come.
  if (!flags.to) await inbox.begun
  await sendAll(writer(channel), { messages, size, blob, lossy: inbox.lossy })
  signal({ type: 'message', to: peer, payload: { messages, blob } })
  await inbox.complete
  signal({ type: 'bye', to: peer })
  await released
  console.log(JSON.stringify({ opened_ms, ...inbox.summary, local: pair?.local.type, remote: pair?.remote.type }))
  finish(inbox.sound ? 0 : 1)
}

/** Sends on a channel, and waits while it holds more than the network takes. */
function writer(channel) {
  let drained = () => {}
  channel.setBufferedAmountLowThreshold(HIGH_WATER / 2)
  channel.onBufferedAmountLow(() => drained())
  return async (data) => {
    if (typeof data === 'string') channel.sendMessage(data)
    else channel.sendMessageBinary(data)
    if (channel.bufferedAmount() > HIGH_WATER) await new Promise((resolve) => (drained = resolve))
  }
}

function signal(frame) {
  socket.send(JSON.stringify(frame))
}

function fail(error) {
  console.error(error.message)
  finish(1)
}

function finish(code) {
  process.exitCode = code
  connection?.close()
  socket.close()
}
