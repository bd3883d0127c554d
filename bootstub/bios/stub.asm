; The boot stub for BIOS machines: an idle mirror VM's console, and the start of its disk.
;
; Once a second it reads the status sector (one sector at a fixed place on the stub's own floppy,
; rewritten in place by the appliance), judges it, and shows it on the 80 x 25 text screen and on
; the first serial port. Between two reads the processor sleeps. A believable block that says
; `promoted` makes it start the mirror's disk as the BIOS would have done: failover needs no call
; to the hypervisor.
;
; What it must never do: believe a block whose magic, version or checksum is wrong; start a disk
; for a block of a lower generation than one it has seen; wait for anything without a bound; stand
; still in silence. Only the block that was read in this very second can promote; an older good one
; stays out of the decision.
;
; Idle cost is a product number (facts of this kind: see clock.inc): one wake-up a second, one
; sector read, and only cells of the screen that differ are written.

bits 16
cpu 686
%include "memory.inc"
org STUB_ADDR

        dd      STUB_MAGIC
        jmp     main

; The verdict about the sector that was read last
VERDICT_NONE       equ 0                ; nothing was read yet
VERDICT_GOOD       equ 1
VERDICT_MAGIC      equ 2
VERDICT_VERSION    equ 3
VERDICT_CHECKSUM   equ 4
VERDICT_UNREADABLE equ 5

; What became of a promotion
PROMOTION_NONE       equ 0
PROMOTION_LOWER      equ 1              ; refused: a higher generation was seen
PROMOTION_NO_DISK    equ 2              ; the block names a drive below 0x80
PROMOTION_UNREADABLE equ 3
PROMOTION_UNSIGNED   equ 4              ; no 55 AA at the end of its first sector

STALE_S         equ 10                  ; the appliance writes about once a second

main:
        xor     ax, ax
        mov     di, VARS_ADDR
        mov     cx, (vars_end - VARS_ADDR + 1) / 2
        rep     stosw
        mov     al, [ENTRY_EDX]
        mov     [stub_drive], al
        call    serial_init
        call    screen_init
        call    look
        call    show                    ; before the clocks are measured: nobody waits for that
        call    clock_init
        mov     si, txt_timer_pit
        cmp     byte [sleep_by_apic], 0
        je      .say
        mov     si, txt_timer_apic
.say:
        call    serial_text
        call    serial_newline

.second:
        call    clock_sleep
        inc     dword [age_s]
        jnz     .fits
        dec     dword [age_s]           ; stays at its end after 136 years
.fits:
        call    look
        call    show
        jmp     .second

; Read and judge the status sector, and act on a promotion.
; Out: verdict, promotion, stale, error_code, block_changed.  Clobbers: all.
; Does not return when the mirror's disk was started.
look:
        call    status_read
        mov     byte [promotion], PROMOTION_NONE
        mov     byte [disk_error], 0
        cmp     byte [verdict], VERDICT_GOOD
        jne     .age
        cmp     byte [good + STATUS_OFF_PROMOTED], 1
        jne     .age                    ; nothing but 1 means it
        call    promote
.age:
        mov     byte [stale], 0
        cmp     byte [has_good], 0
        je      .done
        cmp     dword [age_s], STALE_S
        jbe     .done
        mov     byte [stale], 1
.done:
        ret

; Bring screen and serial port up to date (the port only with news); costs next to nothing when only
; the age changed.
; Clobbers: all.
show:
        cmp     byte [block_changed], 0
        jne     .changed
        mov     si, outcome
        mov     di, outcome_shown
        mov     cx, OUTCOME_BYTES
        repe    cmpsb
        jne     .changed
        jmp     draw_age
.changed:
        call    draw_all
        call    is_news
        je      .shown
        call    report
        mov     si, good
        mov     di, said
        mov     cx, SECTOR_BYTES / 4
        rep     movsd
.shown:
        mov     si, outcome
        mov     di, outcome_shown
        mov     cx, OUTCOME_BYTES
        rep     movsb
        mov     byte [block_changed], 0
        ret

; Is there anything worth a line on the serial port? Sequence, times, lag, dirty bytes and the text
; change all the while, and would fill whatever log the port ends in.
; Out: ZF clear if so.  Clobbers: CX, SI, DI.
is_news:
        mov     si, outcome
        mov     di, outcome_shown
        mov     cx, OUTCOME_BYTES
        repe    cmpsb
        jne     .done
        mov     si, good + STATUS_OFF_GENERATION
        mov     di, said + STATUS_OFF_GENERATION
        mov     cx, 8
        repe    cmpsb
        jne     .done
        mov     si, good + STATUS_OFF_STATE
        mov     di, said + STATUS_OFF_STATE
        mov     cx, STATUS_OFF_LAST_SYNC_TEXT - STATUS_OFF_STATE
        repe    cmpsb
        jne     .done
        mov     si, good + STATUS_OFF_MIRROR_TEXT
        mov     di, said + STATUS_OFF_MIRROR_TEXT
        mov     cx, STATUS_LEN_MIRROR_TEXT
        repe    cmpsb
.done:
        ret

%include "clock.inc"
%include "disk.inc"
%include "status.inc"
%include "promote.inc"
%include "numbers.inc"
%include "messages.inc"
%include "serial.inc"
%include "screen.inc"
%include "draw.inc"
%include "texts.inc"

        times   (-($ - $$)) & (SECTOR_BYTES - 1) db 0
%if $ - $$ > STUB_SECTORS_MAX * SECTOR_BYTES
%error the stub has outgrown the first track of the floppy
%endif

        absolute VARS_ADDR
stub_drive:     resb 1                  ; BIOS number of the floppy we came from
has_good:       resb 1                  ; a believable block was read since boot
block_changed:  resb 1                  ; it, or the verdict about it, is another one than before
sleep_by_apic:  resb 1
has_judged:     resb 1                  ; the buffer `judged` holds what the verdict is about
serial_stuck:   resb 1                  ; the port does not empty; the rest of this line is dropped
bios_answer:    resb 1                  ; error code of the last sector read
; What is shown beside the block itself; compared as a whole
outcome:
verdict:        resb 1
error_code:     resb 1                  ; of the BIOS, when the verdict is UNREADABLE
promotion:      resb 1
disk_error:     resb 1                  ; of the BIOS, when the promotion is UNREADABLE
stale:          resb 1
OUTCOME_BYTES   equ $ - outcome
outcome_shown:  resb OUTCOME_BYTES

        alignb  4
age_s:          resd 1                  ; since the sequence number changed last
generation_max: resq 1                  ; the highest seen since boot
bad_version:    resd 1                  ; what a block of another version said
ticks:          resd 1                  ; the BIOS tick at which this second ends or ended ...
ticks_fraction: resd 1                  ; ... and its fraction, in 1/65536
apic_base:      resd 1
apic_count_s:   resd 1                  ; timer counts in one second
apic_divide:    resd 1                  ; as found
apic_lvt:       resd 1                  ; as found
apic_vector:    resd 1                  ; interrupt vector, as found
apic_fired:     resb 1
pit_control:    resb 1                  ; as found
gdt_found:      resb 6
gdt_ours:       resb 6
serial_base:    resw 1
number:         resq 1
number_text:    resb 24
message:        resb MESSAGE_BYTES
message_end:    resw 1
wrap_width:     resw 1
wrap_rows:      resw 1
vars_end:

        absolute SECTORS_ADDR
incoming:       resb SECTOR_BYTES       ; as read now
judged:         resb SECTOR_BYTES       ; as read when the verdict was given
good:           resb SECTOR_BYTES       ; the last believable one
said:           resb SECTOR_BYTES       ; the one that the serial port was told of last
